"""A job's settings from its request, with the recipe's defaults filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_gateway.schemas.training import JobFields, LossFields
from kiln_gateway.training.gate import gate_config


@dataclass(frozen=True, slots=True)
class RecipeDefaults:
    """What a recipe takes where the request says nothing.

    `gradient_accumulation` 0 makes one optimiser step of each epoch.
    """

    epochs: int
    gradient_accumulation: int
    batch_tokens: int = 8192


SFT_DEFAULTS = RecipeDefaults(epochs=3, gradient_accumulation=1)
GRPO_DEFAULTS = RecipeDefaults(epochs=1, gradient_accumulation=0)
OPD_DEFAULTS = RecipeDefaults(epochs=1, gradient_accumulation=0)


def job_config(
    body: JobFields,
    defaults: RecipeDefaults,
    *,
    longest_document: int,
    attach: bool,
    gate: trainer_pb2.Gate | None = None,
) -> trainer_pb2.JobConfig:
    """The complete settings; the default batch_tokens grows to hold the longest document."""
    targets = [body.lora.targets] if isinstance(body.lora.targets, str) else body.lora.targets
    accumulation = body.gradient_accumulation
    return trainer_pb2.JobConfig(
        adapter=body.adapter,
        base_adapter=body.base_adapter or "",
        start_fresh=body.starts_fresh,
        lora=trainer_pb2.LoraConfig(
            rank=body.lora.rank, alpha=body.lora.alpha, targets=targets, dropout=body.lora.dropout
        ),
        optimizer=trainer_pb2.OptimizerConfig(
            learning_rate=body.learning_rate,
            weight_decay=body.weight_decay,
            max_grad_norm=body.max_grad_norm,
            warmup_ratio=body.warmup_ratio,
            schedule=body.schedule,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            type=body.optimizer,
        ),
        epochs=body.epochs or defaults.epochs,
        batch_tokens=body.batch_tokens or max(defaults.batch_tokens, longest_document),
        gradient_accumulation=defaults.gradient_accumulation if accumulation is None else accumulation,
        seed=body.seed,
        checkpoint_every=body.checkpoint_every,
        attach=attach,
        metadata_json=json.dumps(body.metadata or {}),
        publish=str(body.publish),
        priority=body.priority,
        gate=gate,
        train_mtp=body.train_mtp,
    )


def grpo_loss(loss: LossFields) -> trainer_pb2.GrpoLoss:
    """What the request says; the trainer knows each loss type's defaults."""
    return trainer_pb2.GrpoLoss(
        type=loss.type,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl_coef=loss.kl.coef,
        kl_estimator=loss.kl.estimator,
        importance_mode=loss.importance.mode,
        importance_cap=loss.importance.cap,
        scale_rewards=loss.scale_rewards,
        mask_truncated_completions=loss.mask_truncated_completions,
    )


def effective_config(job: trainer_pb2.Job) -> dict[str, Any]:
    """A job's settings as clients wrote them, or could have."""
    config, optimizer = job.config, job.config.optimizer
    targets = list(config.lora.targets)
    is_group = len(targets) == 1 and targets[0] in ("all", "attention", "mlp")
    body: dict[str, Any] = {
        "adapter": config.adapter,
        "base_adapter": config.base_adapter or None,
        "lora": {
            "rank": config.lora.rank,
            "alpha": config.lora.alpha,
            "targets": targets[0] if is_group else targets,
            "dropout": config.lora.dropout,
        },
        "learning_rate": optimizer.learning_rate,
        "epochs": config.epochs,
        "batch_tokens": config.batch_tokens,
        "gradient_accumulation": config.gradient_accumulation,
        "warmup_ratio": optimizer.warmup_ratio,
        "schedule": optimizer.schedule,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "optimizer": optimizer.type or "adamw",
        "train_mtp": config.train_mtp,
        "seed": config.seed,
        "checkpoint_every": config.checkpoint_every,
        "publish": int(config.publish) if config.publish.isdecimal() else config.publish,
        "attach": config.attach,
        "priority": config.priority,
    }
    if config.HasField("gate"):
        body["gate"] = gate_config(config.gate)
    if job.kind == "grpo":
        body["loss"] = _loss(job.grpo_loss)
    if job.kind == "opd":
        body |= _opd_settings(job.opd_settings)
    return body


def _loss(loss: trainer_pb2.GrpoLoss) -> dict[str, Any]:
    return {
        "type": loss.type,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "kl": {"coef": loss.kl_coef, "estimator": loss.kl_estimator},
        "importance": {"mode": loss.importance_mode, "cap": loss.importance_cap},
        "scale_rewards": loss.scale_rewards,
        "mask_truncated_completions": loss.mask_truncated_completions,
    }


def _teacher(settings: trainer_pb2.OpdSettings) -> str | dict[str, Any]:
    if not settings.HasField("teacher_model"):
        return settings.teacher
    teacher = settings.teacher_model
    return {"model": teacher.model_id, "sha256": teacher.model_hash, "top_k": teacher.top_k}


def _opd_settings(settings: trainer_pb2.OpdSettings) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "teacher": _teacher(settings),
        "divergence": {"type": settings.divergence, "beta": settings.beta},
    }
    sampling = settings.sampling
    if sampling.max_tokens:  # nothing is sampled where completions were given
        shown["rollout"] = {
            "n": settings.samples_per_prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_token_ids": list(sampling.stop_token_ids),
            "prompts_per_step": settings.prompts_per_step,
            "refresh_every": settings.refresh_every,
        }
    return shown
