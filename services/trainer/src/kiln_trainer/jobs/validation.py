"""Checks a job before it is accepted, so that whatever is queued can be trained on."""

from __future__ import annotations

import json
import math
import re

from kiln_common.adapter_names import check_adapter_name, parse_reference
from kiln_common.errors import InvalidRequest, InvalidValue
from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2
from kiln_trainer.domain.errors import ModelWithoutMtp, NoLearningSignal
from kiln_trainer.jobs.document_limits import DocumentLimits
from kiln_trainer.jobs.errors import (
    EmptyTrainingData,
    GroupTooSmall,
    InvalidJobConfig,
    InvalidReward,
    JobBaseModelMismatch,
    LengthMismatch,
)
from kiln_trainer.jobs.opd_validation import check_opd
from kiln_trainer.recipes.advantages import is_constant, is_learned_from
from kiln_trainer.recipes.errors import NoTrainableTokens
from kiln_trainer.recipes.options import GrpoOptions, OptimizerOptions, RunOptions

MAX_RANK = 256
_MAX_EPOCHS = 1000
MAX_PRIORITY = 10  # the queue's scores have room for these
_MAX_LEARNING_RATE = 1.0  # AdamW moves each weight by about this much a step
_MAX_REWARD = 1e9  # float32 advantages, and their products with gradients, stay finite
_PUBLISH_EVERY = re.compile(r"[1-9][0-9]{0,8}")
_CORRECTION_ID = re.compile(r"corr_[0-9a-f]{32}")
_TARGET_GROUPS = frozenset({"all", "attention", "mlp"})


def check_request(request: trainer_pb2.SubmitRequest, engine: engine_pb2.EngineInfo | None) -> None:
    """Refuse a job that cannot succeed.

    `engine`: what the engine says of itself, None while no engine has answered; then token ids and
    targets are checked only when the job runs.

    Raises:
        InvalidRequest and its kind, each with its own code; JobBaseModelMismatch; NotBuiltYet.
    """
    base_model = engine.base_model if engine is not None else None
    max_rank = engine.max_adapter_rank if engine is not None else 0
    _check_config(request.config, base_model, max_rank or MAX_RANK)
    if base_model is not None and request.base_model_hash not in ("", base_model.model_hash):
        raise JobBaseModelMismatch(
            f"the job is for base model {request.base_model_hash[:12]}, "
            f"the engine serves {base_model.model_hash[:12]}"
        )
    for correction_id in request.correction_ids:
        if not _CORRECTION_ID.fullmatch(correction_id):
            raise InvalidValue(f"{correction_id[:60]!r} is not a correction's id", param="corrections")
    limits = DocumentLimits(request.config, base_model)
    match request.WhichOneof("recipe"):
        case "sft":
            _check_sft(request.sft, limits)
        case "grpo":
            _check_grpo(request.grpo, limits)
        case "opd":
            check_opd(request.opd, request.config, limits)
        case _:
            raise InvalidRequest("the job names no recipe", hint="Give sft, grpo or opd.")


def _check_config(
    config: trainer_pb2.JobConfig, base_model: common_pb2.BaseModel | None, max_rank: int
) -> None:
    check_adapter_name(config.adapter, reserved=[base_model.model_id] if base_model else ())
    if config.base_adapter:
        parse_reference(config.base_adapter, param="base_adapter")
        if config.start_fresh:
            raise InvalidJobConfig("start_fresh and base_adapter exclude each other", param="base_adapter")
    if config.HasField("gate"):
        _check_gate(config)
    _check_lora(config.lora, base_model, max_rank)
    if config.train_mtp and base_model is not None and not base_model.draft_modules:
        raise ModelWithoutMtp(f"{base_model.model_id!r} has no multi-token-prediction layer")
    optimizer = config.optimizer
    if not 0 < optimizer.learning_rate <= _MAX_LEARNING_RATE:
        raise InvalidJobConfig(
            f"learning_rate is {optimizer.learning_rate}, "
            f"it must be above 0 and at most {_MAX_LEARNING_RATE}",
            hint="Adapters mostly learn well between 1e-5 and 1e-3.",
            param="learning_rate",
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise InvalidJobConfig(f"{name} is {getattr(optimizer, name)}, it must be in [0, 1)", param=name)
    if not 0 <= optimizer.adam_eps < math.inf:
        raise InvalidJobConfig(f"adam_eps is {optimizer.adam_eps}", param="adam_eps")
    if not 0 <= optimizer.warmup_ratio <= 1:
        raise InvalidJobConfig(f"warmup_ratio is {optimizer.warmup_ratio}, at most 1", param="warmup_ratio")
    OptimizerOptions.from_proto(optimizer)
    for name in ("batch_tokens", "gradient_accumulation", "checkpoint_every", "epochs"):
        if getattr(config, name) < 0:
            raise InvalidJobConfig(f"{name} is {getattr(config, name)}, it must not be negative", param=name)
    if config.epochs > _MAX_EPOCHS:
        raise InvalidJobConfig(f"epochs is {config.epochs}, at most {_MAX_EPOCHS}", param="epochs")
    if config.publish not in ("", "end", "never") and not _PUBLISH_EVERY.fullmatch(config.publish):
        raise InvalidJobConfig(
            f"publish is {config.publish[:40]!r}, known are end, never and a number of steps", param="publish"
        )
    if abs(config.priority) > MAX_PRIORITY:
        raise InvalidJobConfig(
            f"priority is {config.priority}, it must be {-MAX_PRIORITY} to {MAX_PRIORITY}", param="priority"
        )
    _check_metadata(config.metadata_json)
    RunOptions.from_proto(config)


def _check_gate(config: trainer_pb2.JobConfig) -> None:
    gate = config.gate
    if config.publish not in ("", "end"):
        raise InvalidJobConfig(
            f'a gate judges what is published at the end, and publish is "{config.publish}"', param="gate"
        )
    if not gate.suite_id or not 0 <= gate.min_score <= 1 or not gate.timeout_s > 0:
        raise InvalidJobConfig(
            f"a gate needs a suite, a min_score from 0 to 1 and a timeout, got {gate.min_score:g} "
            f"and {gate.timeout_s:g} s",
            param="gate",
        )


def _check_lora(lora: trainer_pb2.LoraConfig, base_model: common_pb2.BaseModel | None, max_rank: int) -> None:
    """0 and empty mean the defaults. `max_rank`: what fits an engine's adapter slot."""
    if not 0 <= lora.rank <= max_rank:
        raise InvalidJobConfig(f"lora.rank is {lora.rank}, it must be 1 to {max_rank}", param="lora.rank")
    if not 0 <= lora.alpha < math.inf:
        raise InvalidJobConfig(f"lora.alpha is {lora.alpha}, it must be positive", param="lora.alpha")
    if base_model is None or not base_model.adaptable_modules:
        return
    known = {module.path.rpartition(".")[2] for module in base_model.adaptable_modules} | _TARGET_GROUPS
    for target in lora.targets:
        if target not in known:
            raise InvalidJobConfig(
                f"lora.targets names {target[:60]!r}, known are {', '.join(sorted(known))}",
                param="lora.targets",
            )


def _check_metadata(metadata_json: str) -> None:
    try:
        is_object = isinstance(json.loads(metadata_json or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise InvalidJobConfig("metadata_json must be a JSON object", param="metadata")


def _check_sft(spec: trainer_pb2.SftSpec, limits: DocumentLimits) -> None:
    if not spec.examples:
        raise EmptyTrainingData("there are no examples", param="examples")
    has_signal = False
    for index, example in enumerate(spec.examples):
        if not example.token_ids:
            raise EmptyTrainingData(f"example {index} has no tokens", param="examples")
        if len(example.token_ids) != len(example.loss_weights):
            raise LengthMismatch(
                f"example {index} has {len(example.token_ids)} tokens and {len(example.loss_weights)} weights",
                param="examples",
            )
        if not all(0 <= weight < math.inf for weight in example.loss_weights):
            raise InvalidValue(f"example {index} has a negative or infinite weight", param="examples")
        has_signal = has_signal or any(example.loss_weights[1:])
        limits.check(index, example.token_ids)
    if not has_signal:
        raise NoTrainableTokens(f"none of {len(spec.examples)} examples has a token with a weight")


def _check_grpo(spec: trainer_pb2.GrpoSpec, limits: DocumentLimits) -> None:
    _check_loss(spec.loss)
    if not spec.groups:
        raise EmptyTrainingData("there are no groups", param="groups")
    number = 0
    for index, group in enumerate(spec.groups):
        if len(group.rollouts) < 2:
            raise GroupTooSmall(f"group {index} has {len(group.rollouts)} completions", param="groups")
        for rollout in group.rollouts:
            _check_rollout(number, rollout, limits)
            number += 1
    telling = [group for group in spec.groups if not is_constant([r.reward for r in group.rollouts])]
    if not telling:
        raise NoLearningSignal(f"the rewards in each of {len(spec.groups)} groups are equal", param="rewards")
    masks = spec.loss.mask_truncated_completions
    drawn = [rollout for group in telling for rollout in group.rollouts]
    if not any(is_learned_from(rollout, masks_truncated=masks) for rollout in drawn):
        raise EmptyTrainingData(
            "every completion with a reward of its own is empty or masked", param="groups"
        )


def _check_loss(loss: trainer_pb2.GrpoLoss) -> None:
    for name in ("clip_low", "clip_high", "kl_coef", "importance_cap"):
        if not 0 <= getattr(loss, name) < math.inf:
            raise InvalidJobConfig(
                f"loss.{name} is {getattr(loss, name)}, it must be finite and not negative",
                param=f"loss.{name}",
            )
    GrpoOptions.from_proto(loss)


def _check_rollout(number: int, rollout: trainer_pb2.GrpoRollout, limits: DocumentLimits) -> None:
    if not rollout.prompt_token_ids:
        raise EmptyTrainingData(f"rollout {number} has no prompt tokens", param="groups")
    if not abs(rollout.reward) <= _MAX_REWARD:
        raise InvalidReward(f"rollout {number} has the reward {rollout.reward}", param="rewards")
    num_scored, num_known = len(rollout.completion_token_ids), len(rollout.behaviour_logprobs)
    if num_known not in (0, num_scored):
        raise LengthMismatch(
            f"rollout {number} has {num_scored} completion tokens and {num_known} log-probabilities",
            param="groups",
        )
    if not all(logprob <= 1e-3 and math.isfinite(logprob) for logprob in rollout.behaviour_logprobs):
        raise InvalidValue(f"rollout {number} has a number that is no log-probability", param="groups")
    if not 0 <= rollout.temperature < math.inf:
        raise InvalidValue(f"rollout {number} has the temperature {rollout.temperature}", param="groups")
    limits.check(number, rollout.prompt_token_ids, rollout.completion_token_ids)
