"""POST /v1/train/jobs/{id}/retry: which of a job's settings are to change, and to what."""

from __future__ import annotations

from google.protobuf.field_mask_pb2 import FieldMask

from kiln_common.pb import trainer_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.schemas.training import RetryBody
from kiln_gateway.training.job_config import GRPO_DEFAULTS, OPD_DEFAULTS, SFT_DEFAULTS, job_config
from kiln_gateway.training.job_rights import attaches, check_priority

_DEFAULTS = {"sft": SFT_DEFAULTS, "grpo": GRPO_DEFAULTS, "opd": OPD_DEFAULTS}

# Where each field of a request lies in a JobConfig.
PATHS: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter",),
    "base_adapter": ("base_adapter", "start_fresh"),
    "lora": ("lora",),
    "optimizer": ("optimizer.type",),
    "learning_rate": ("optimizer.learning_rate",),
    "epochs": ("epochs",),
    "batch_tokens": ("batch_tokens",),
    "gradient_accumulation": ("gradient_accumulation",),
    "warmup_ratio": ("optimizer.warmup_ratio",),
    "schedule": ("optimizer.schedule",),
    "weight_decay": ("optimizer.weight_decay",),
    "max_grad_norm": ("optimizer.max_grad_norm",),
    "train_mtp": ("train_mtp",),
    "seed": ("seed",),
    "checkpoint_every": ("checkpoint_every",),
    "publish": ("publish",),
    "attach": ("attach",),
    "gate": ("gate",),
    "priority": ("priority",),
    "metadata": ("metadata_json",),
}


def retry_request(
    job: trainer_pb2.Job, body: RetryBody, caller: Caller, key: str, gate: trainer_pb2.Gate | None
) -> trainer_pb2.RetryJobRequest:
    """The fields that the body has, and those that the caller may not take over as they were.

    Raises:
        ScopeMissing: a field asks for what the key may not decide.
    """
    check_priority(body.priority, caller)
    given = [name for name in PATHS if name in body.model_fields_set]
    is_admin = "admin" in caller.scopes
    may_attach = attaches(body, caller)
    if not is_admin and job.config.attach:
        given.append("attach")
    if not is_admin and job.config.priority < 0:
        given.append("priority")
    return trainer_pb2.RetryJobRequest(
        id=job.id,
        changes=job_config(body, _DEFAULTS[job.kind], longest_document=0, attach=may_attach, gate=gate),
        changed=FieldMask(paths=dict.fromkeys(path for name in given for path in PATHS[name])),
        idempotency_key=key,
        owner=caller.owner,
        webhook=_webhook(body) if "webhook" in body.model_fields_set else None,
    )


def _webhook(body: RetryBody) -> trainer_pb2.Webhook:
    return body.webhook.to_proto() if body.webhook is not None else trainer_pb2.Webhook()
