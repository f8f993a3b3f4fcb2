"""A job as it lies in Redis, and as clients see it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_trainer.recipes.opd_options import OpdOptions
from kiln_trainer.recipes.options import GrpoOptions

# Whoever submits says who drew a rollout, so what is kept of that is bounded.
_MOST_SAMPLERS = 50
_MOST_SAMPLER_CHARS = 400
FINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed, as clients see it."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Published:
    """What a job has published so far, as its hash keeps it.

    `default_before`: the version that was the default adapter before the job attached its first one,
    "" for none; None until the job attaches.
    """

    versions: tuple[dict[str, Any], ...] = ()  # step, adapter, version, sha256
    default_before: str | None = None

    def to_json(self) -> str:
        return json.dumps({"versions": self.versions, "default_before": self.default_before})

    @classmethod
    def from_json(cls, text: str) -> Published:
        fields = json.loads(text or "{}")
        return cls(tuple(fields.get("versions", ())), fields.get("default_before"))


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a job until a later claim exists."""

    job_id: str
    adapter: str
    claim_epoch: int
    # Claims in a row that ended without a word and without a new checkpoint.
    num_crashes: int
    # "keep" or "discard" what was published, once a cancel is asked for; "" before.
    cancel: str
    # "name@version" or "" once an earlier claim resolved it; None before.
    resolved_base: str | None
    published: Published = Published()
    created_at_s: float = 0.0
    # The trace that its submission belongs to, empty without one.
    traceparent: str = ""


def data_sha256(request: trainer_pb2.SubmitRequest) -> str:
    """Hash of what a job learns from, without the settings that a recipe keeps beside it."""
    kind = request.WhichOneof("recipe")
    if kind is None:
        return ""
    data = type(getattr(request, kind))()
    data.CopyFrom(getattr(request, kind))
    for settings in ("loss", "settings"):
        if settings in data.DESCRIPTOR.fields_by_name:
            data.ClearField(settings)
    return hashlib.sha256(data.SerializeToString(deterministic=True)).hexdigest()


def submitted_fields(request: trainer_pb2.SubmitRequest, payload_sha256: str) -> dict[str, str | bytes]:
    """The hash fields of a new job that follow from its request, which was checked before."""
    kind = request.WhichOneof("recipe") or ""
    grpo = [rollout for group in request.grpo.groups for rollout in group.rollouts]
    sources = Counter(rollout.source or "token_ids" for rollout in [*grpo, *request.opd.rollouts])
    return {
        "adapter": request.config.adapter,
        "kind": kind,
        "config": request.config.SerializeToString(deterministic=True),
        "grpo_loss": _grpo_loss(request) if kind == "grpo" else b"",
        "opd_settings": _opd_settings(request) if kind == "opd" else b"",
        "sources": json.dumps(sources),
        "sampled_by": json.dumps(sampled_by(request)),
        "idempotency_key": request.idempotency_key,
        "payload_sha256": payload_sha256,
        "retry_of": request.retry_of,
        "base_model_hash": request.base_model_hash,
        "data_sha256": data_sha256(request),
        "webhook": request.webhook.SerializeToString(deterministic=True),
        "dataset": request.dataset.SerializeToString(deterministic=True),
    }


def sampled_by(request: trainer_pb2.SubmitRequest) -> dict[str, int]:
    """How many of the rollouts that a job was given each adapter version drew, where that is known."""
    scored = (rollout.adapter_version for group in request.grpo.groups for rollout in group.rollouts)
    given = (rollout.adapter_version for rollout in request.opd.rollouts)
    named = (version[:_MOST_SAMPLER_CHARS] for version in chain(scored, given))
    return dict(Counter(filter(None, named)).most_common(_MOST_SAMPLERS))


def _grpo_loss(request: trainer_pb2.SubmitRequest) -> bytes:
    """The loss with every default spelled out, for clients to see."""
    return GrpoOptions.from_proto(request.grpo.loss).to_proto().SerializeToString(deterministic=True)


def _opd_settings(request: trainer_pb2.SubmitRequest) -> bytes:
    wire = request.opd.settings
    return OpdOptions.from_proto(wire).to_proto(wire).SerializeToString(deterministic=True)


def to_job(
    job_id: str,
    fields: Mapping[bytes, bytes],
    queue_position: int | None,
    history: list[trainer_pb2.StepMetrics],
) -> trainer_pb2.Job:
    """The wire form of a job's hash."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode()

    def parsed(name: str) -> Any:
        return json.loads(text(name) or "{}")

    job = trainer_pb2.Job(
        id=job_id,
        kind=text("kind"),
        status=text("status"),
        config=trainer_pb2.JobConfig.FromString(fields.get(b"config", b"")),
        metrics=parsed("metrics"),
        created_at_s=float(text("created_at_s") or 0),
        started_at_s=float(text("started_at_s") or 0),
        finished_at_s=float(text("finished_at_s") or 0),
        queue_position=queue_position or 0,
        resolved_base_adapter=text("resolved_base"),
        claim_epoch=int(text("claim_epoch") or 0),
        sources=parsed("sources"),
        sampled_by=parsed("sampled_by"),
        payload_sha256=text("payload_sha256"),
        history=history,
        owner=text("owner"),
        retry_of=text("retry_of"),
        published=[
            trainer_pb2.PublishedVersion(**version)
            for version in Published.from_json(text("published")).versions
        ],
        base_model_hash=text("base_model_hash"),
        base_adapter_sha256=text("base_adapter_sha256"),
        data_sha256=text("data_sha256"),
        environment=parsed("environment"),
        correction_ids=[correction_id for correction_id in text("corrections").split(",") if correction_id],
        dataset=trainer_pb2.DatasetRef.FromString(fields.get(b"dataset", b"")),
    )
    if webhook := fields.get(b"webhook"):
        state = parsed("webhook_state") or {"status": "pending"}
        url = trainer_pb2.Webhook.FromString(webhook).url
        job.webhook.CopyFrom(trainer_pb2.WebhookState(url=url, **state))
    if job.kind == "grpo":
        job.grpo_loss.CopyFrom(trainer_pb2.GrpoLoss.FromString(fields.get(b"grpo_loss", b"")))
    if job.kind == "opd":
        job.opd_settings.CopyFrom(trainer_pb2.OpdSettings.FromString(fields.get(b"opd_settings", b"")))
    if progress := parsed("progress"):
        job.progress.CopyFrom(trainer_pb2.JobProgress(**progress))
    if error := parsed("error"):
        job.error.CopyFrom(trainer_pb2.JobError(**error))
    if result := parsed("result"):
        job.result.CopyFrom(trainer_pb2.JobResult(**result))
    return job


def to_event(event_id: bytes, fields: Mapping[bytes, bytes]) -> trainer_pb2.JobEvent:
    """The wire form of one entry of a job's event stream."""
    return trainer_pb2.JobEvent(
        id=event_id.decode(),
        type=fields[b"type"].decode(),
        data_json=fields[b"data"].decode(),
        at_s=float(fields[b"at_s"]),
    )


def downsample(events: list[trainer_pb2.JobEvent], max_points: int) -> list[trainer_pb2.StepMetrics]:
    """Metrics by step, at most `max_points` of them, evenly spaced and with the last one.

    A resumed job takes some steps again; the later report of a step counts.
    """
    by_step: dict[int, dict[str, float]] = {}
    for event in events:
        if event.type == "step":
            data = json.loads(event.data_json)
            by_step[data["step"]] = data["metrics"]
    steps = sorted(by_step)
    stride = -(-len(steps) // max_points) or 1
    kept = steps[::-1][::stride][::-1]
    return [trainer_pb2.StepMetrics(step=step, metrics=by_step[step]) for step in kept]
