"""Every Redis key and stream, in one place: name, writer, readers."""

from __future__ import annotations

# Stream of adapter facts. Written by the registry's outbox; read by engines and gateways.
ADAPTER_EVENTS = "kiln:events:adapters"

# Durable job queue (stream with consumer group JOB_GROUP). Written by Trainer.Submit only.
JOB_QUEUE = "kiln:jobs:queue"
JOB_GROUP = "trainers"

# Sorted set of job ids by creation time.
JOB_INDEX = "kiln:jobs:index"

# Sorted set of the ids of queued jobs by order of acceptance, and the counter that gives the order.
JOB_QUEUED = "kiln:jobs:queued"
JOB_SEQUENCE = "kiln:jobs:sequence"


def adapter_jobs(adapter: str) -> str:
    """List of an adapter name's jobs that have not ended, in order; only the first may run."""
    return f"kiln:jobs:adapter:{adapter}"


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
    """Hash with the job id and payload hash behind an idempotency key."""
    return f"kiln:jobs:idempotency:{key}"


def rollout(completion_id: str, index: int) -> str:
    """One kept rollout (with a TTL). Written and read by gateways."""
    return f"kiln:rollout:{completion_id}:{index}"


# Sorted set of kept rollouts by age, and the sum of their bytes. Written by gateways.
ROLLOUT_INDEX = "kiln:rollouts:index"
ROLLOUT_BYTES = "kiln:rollouts:bytes"


def rollout_matches(match_key: str) -> str:
    """List of rollout keys with one owner, messages and content, newest first."""
    return f"kiln:rollouts:matches:{match_key}"


def response(response_id: str) -> str:
    """A kept response of POST /v1/responses and its conversation (with a TTL). Written and read by gateways."""
    return f"kiln:response:{response_id}"


# Sorted set of kept responses by age, and the sum of their bytes. Written by gateways.
RESPONSE_INDEX = "kiln:responses:index"
RESPONSE_BYTES = "kiln:responses:bytes"


def key_limit(owner: str, limit: str) -> str:
    """Hash with the level of one limit of one key's owner, and when it was so. Written by gateways."""
    return f"kiln:limits:{owner}:{limit}"


def gateway_idempotency(service_key: str) -> str:
    """Body hash and resource id behind an Idempotency-Key. Written and read by gateways."""
    return f"kiln:gateway:idempotency:{service_key}"
