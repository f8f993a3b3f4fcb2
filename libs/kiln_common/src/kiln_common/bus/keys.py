"""Every Redis key and stream, in one place: name, writer, readers."""

from __future__ import annotations

# Stream of adapter facts. Written by the registry's outbox; read by engines and gateways.
ADAPTER_EVENTS = "kiln:events:adapters"

# Set of the boot ids of engines. Written by engines; readers take out those whose word has lapsed.
ENGINES = "kiln:engines"


def engine(boot_id: str) -> str:
    """An engine's word about itself, as JSON (with a TTL of seconds). Written by that engine."""
    return f"kiln:engine:{boot_id}"


# Sorted set of job ids by creation time.
JOB_INDEX = "kiln:jobs:index"

# Sorted set of the ids of queued jobs in the order in which they will run, and the counter behind that
# order. Written by trainers' scripts only, like all that follows about jobs.
JOB_QUEUED = "kiln:jobs:queued"
JOB_SEQUENCE = "kiln:jobs:sequence"

# Stream that was the queue before; trainers delete it once they have taken over what was running.
FORMER_JOB_QUEUE = "kiln:jobs:queue"

# Hash: the turn of the job that was claimed last, by priority.
JOB_TURNS = "kiln:jobs:turns"

# Sorted set of the ids of running jobs by the time of their last heartbeat, on the server's clock.
JOB_RUNNING = "kiln:jobs:running"

# List of tokens, one for each time that a job may have become ready: idle trainers wait for them. A
# lost one costs a second, since trainers look at the queue anyway.
JOB_WAKE = "kiln:jobs:wake"


# Sorted set of the ids of ended jobs whose webhook is to be sent, by when. Written by trainers.
WEBHOOKS = "kiln:webhooks"


def owner_queue(priority: int | str, owner: str) -> str:
    """Sorted set of one key's queued jobs of one priority, with their places in JOB_QUEUED."""
    return f"kiln:jobs:owner:{priority}:{owner}"


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


def correction(correction_id: str) -> str:
    """Hash with one correction. Written by gateways; trainers' scripts set `reserved_by` and `used_by`."""
    return f"kiln:correction:{correction_id}"


def corrections(owner: str) -> str:
    """Sorted set of the ids of a key's corrections by age. Written and read by gateways."""
    return f"kiln:corrections:{owner}"


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
