"""Every Redis key and stream, in one place: name, writer, readers."""

from __future__ import annotations

# Stream of adapter facts. Written by the registry's outbox; read by engines and gateways.
ADAPTER_EVENTS = "kiln:events:adapters"

# Durable job queue (stream with consumer group JOB_GROUP). Written by Trainer.Submit only.
JOB_QUEUE = "kiln:jobs:queue"
JOB_GROUP = "trainers"

# Sorted set of job ids by creation time.
JOB_INDEX = "kiln:jobs:index"


def job(job_id: str) -> str:
    """Hash with the job's state. Written by trainers, fenced by the claim epoch."""
    return f"kiln:job:{{{job_id}}}"


def job_payload(job_id: str) -> str:
    """Serialised SubmitRequest, as accepted."""
    return f"kiln:job:{{{job_id}}}:payload"


def job_events(job_id: str) -> str:
    """Stream of the job's events. Written by trainers; read by WatchJob."""
    return f"kiln:job:{{{job_id}}}:events"


def job_idempotency(key: str) -> str:
    """Job id and payload hash behind an idempotency key."""
    return f"kiln:jobs:idempotency:{key}"


def engine_presence(boot_id: str) -> str:
    """JSON about a live engine, with a TTL that the engine renews. Written by that engine."""
    return f"kiln:engine:{boot_id}"


ENGINE_PRESENCE_PATTERN = "kiln:engine:*"


def rollout(completion_id: str, index: int) -> str:
    """One kept rollout (with a TTL). Written and read by gateways."""
    return f"kiln:rollout:{completion_id}:{index}"
