"""A job's receipt: what it was made of and what came out, so that it can be done again and compared."""

from __future__ import annotations

from typing import Any

from kiln_common.errors import JobNotEnded
from kiln_common.pb import trainer_pb2
from kiln_gateway.training.job_config import effective_config
from kiln_gateway.training.job_view import error_of, published, result_of


def receipt(job: trainer_pb2.Job) -> dict[str, Any]:
    """Raises JobNotEnded.

    Two receipts with the same `model`, `base_adapter`, `data.sha256`, `effective_config` and `seeds`
    name the same `result.sha256` on a CPU with the same `software`. A GPU adds up in another order
    each time.
    """
    if job.status in ("queued", "running"):
        raise JobNotEnded(f"{job.id} is {job.status}")
    base = job.resolved_base_adapter
    return {
        "object": "training.receipt",
        "job_id": job.id,
        "kind": job.kind,
        "retry_of": job.retry_of or None,
        "status": job.status,
        "error": error_of(job),
        "model": {"sha256": job.base_model_hash},
        "base_adapter": {"reference": base, "sha256": job.base_adapter_sha256} if base else None,
        "data": {
            "sha256": job.data_sha256,
            "sources": dict(job.sources),
            "corrections": list(job.correction_ids),
            "dataset": {"id": job.dataset.id, "sha256": job.dataset.sha256} if job.dataset.id else None,
        },
        "payload_sha256": job.payload_sha256,
        "effective_config": effective_config(job),
        "seeds": {"job": job.config.seed},
        "software": dict(job.environment),
        "metrics": dict(job.metrics),
        "tokens": job.progress.num_tokens,
        "steps": job.progress.step,
        "result": result_of(job),
        "published": published(job),
        "attempts": job.claim_epoch,
        "created_at": job.created_at_s or None,
        "started_at": job.started_at_s or None,
        "finished_at": job.finished_at_s or None,
    }
