"""What a key may do with jobs: those of its own, and what they may decide for everyone."""

from __future__ import annotations

import asyncio

from kiln_common.errors import JobNotFound, KilnError
from kiln_common.pb import trainer_pb2
from kiln_gateway.auth import Caller, require_scope
from kiln_gateway.ports import TrainerPort
from kiln_gateway.schemas.training import JobFields

_TIMEOUT_S = 2.0


def is_visible(job: trainer_pb2.Job, caller: Caller) -> bool:
    """A job belongs to the key that submitted it; admins see all of them."""
    return "admin" in caller.scopes or job.owner == caller.owner


async def visible_job(trainer: TrainerPort, job_id: str, caller: Caller) -> trainer_pb2.Job:
    """Raises JobNotFound, also for another key's job."""
    job = await trainer.get(job_id)
    if not is_visible(job, caller):
        raise JobNotFound(f"there is no job {job_id[:80]!r}")
    return job


async def visible_running_job(trainer: TrainerPort, job_id: str, caller: Caller) -> str | None:
    """The id of the job that runs now, where `caller` may know it; None also while the trainer is away."""
    if not job_id or "admin" in caller.scopes:
        return job_id or None
    try:
        return (await asyncio.wait_for(visible_job(trainer, job_id, caller), _TIMEOUT_S)).id
    except (KilnError, TimeoutError):
        return None


def attaches(body: JobFields, caller: Caller) -> bool:
    """Whether the result becomes the default: yes, if the key may decide that. Raises ScopeMissing."""
    if body.attach is None:
        return "admin" in caller.scopes
    if body.attach:
        require_scope(caller, "admin")
    return body.attach


def check_priority(priority: int, caller: Caller) -> None:
    """Anyone may let others go first; to go before them takes `admin`. Raises ScopeMissing."""
    if priority < 0:
        require_scope(caller, "admin")
