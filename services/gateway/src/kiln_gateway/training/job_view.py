"""A training job as clients see it."""

from __future__ import annotations

import json
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_gateway.training.gate import gate_outcome
from kiln_gateway.training.job_config import effective_config
from kiln_gateway.training.job_warnings import warnings_of


def job_object(job: trainer_pb2.Job) -> dict[str, Any]:
    """The job of GET /v1/train/jobs/{id}; times are seconds since the epoch, null when not yet."""
    return {
        "id": job.id,
        "object": "training.job",
        "kind": job.kind,
        "status": job.status,
        "queue_position": job.queue_position if job.status == "queued" else None,
        "progress": {
            "step": job.progress.step,
            "steps": job.progress.num_steps,
            "tokens": job.progress.num_tokens,
            "eta_s": job.progress.eta_s,
        },
        "metrics": dict(job.metrics),
        "history": [{"step": entry.step, **entry.metrics} for entry in job.history],
        "error": error_of(job),
        "result": result_of(job),
        "published": published(job),
        "source": _source(job),
        "sources": dict(job.sources),
        "sampled_by": dict(job.sampled_by),
        "warnings": warnings_of(job),
        "base_adapter": job.resolved_base_adapter or None,
        "retry_of": job.retry_of or None,
        "dataset": job.dataset.id or None,
        "corrections": list(job.correction_ids),
        "created_at": job.created_at_s or None,
        "started_at": job.started_at_s or None,
        "finished_at": job.finished_at_s or None,
        "attempts": job.claim_epoch,
        "effective_config": effective_config(job),
        "effective_seed": job.config.seed,
        "metadata": json.loads(job.config.metadata_json or "{}"),
        "webhook": _webhook(job),
        "payload_sha256": job.payload_sha256 or None,
    }


def event_object(event: trainer_pb2.JobEvent) -> dict[str, Any]:
    """One event of a job: its details beside its id, type and time."""
    details = json.loads(event.data_json) if event.data_json else {}
    return {**details, "id": event.id, "type": event.type, "at_s": event.at_s}


def published(job: trainer_pb2.Job) -> list[dict[str, Any]]:
    """Every version that the job has published, with the steps before it."""
    return [
        {"step": each.step, "adapter": each.adapter, "version": each.version, "sha256": each.sha256}
        for each in job.published
    ]


def error_of(job: trainer_pb2.Job) -> dict[str, Any] | None:
    if not job.error.code:
        return None
    return {"code": job.error.code, "message": job.error.message, "hint": job.error.hint or None}


def result_of(job: trainer_pb2.Job) -> dict[str, Any] | None:
    if not job.HasField("result"):
        return None
    return {
        "adapter": job.result.adapter,
        "version": job.result.version,
        "sha256": job.result.sha256,
        "not_live": list(job.result.not_live),
        "swap_s": job.result.swap_s,
        "gate": gate_outcome(job.result),
    }


def _webhook(job: trainer_pb2.Job) -> dict[str, Any] | None:
    if not job.HasField("webhook"):
        return None
    state = job.webhook
    return {
        "url": state.url,
        "status": state.status,
        "attempts": state.num_attempts,
        "error": state.error or None,
    }


def _source(job: trainer_pb2.Job) -> str | None:
    """Where the tokens came from, when all came from one place; "mixed" when not."""
    names = [name for name, count in job.sources.items() if count]
    if not names:
        return None
    return names[0] if len(names) == 1 else "mixed"
