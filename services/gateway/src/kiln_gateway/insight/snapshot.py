"""Reads a snapshot: engines, trainer, registry and this gateway's own requests, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from kiln_common.errors import KilnError
from kiln_common.pb import trainer_pb2
from kiln_gateway.gateway import Gateway
from kiln_gateway.insight.feed import Snapshot
from kiln_gateway.ports import TrainerPort
from kiln_gateway.routes.health import engine_object, engine_stats, engine_totals, training_object

Result = TypeVar("Result")
_TIMEOUT_S = 2.0
_JOBS_SHOWN = 50


async def read_snapshot(gateway: Gateway, owners: frozenset[str | None]) -> Snapshot:
    """How things stand now, for watchers of these `owners` (see Feed); what does not answer in time is left out."""
    found, training, adapters, jobs = await asyncio.gather(
        engine_stats(gateway),
        training_object(gateway),
        _or_none(gateway.clients.registry.list()),
        _or_none(_jobs(gateway.clients.trainer, owners)),
    )
    resident_on: dict[str, list[str]] = {}
    engines = []
    for seat, stats in found:
        engine = engine_object(seat, stats)
        engine.pop("scheduler", None)  # its numbers are in the sample
        engines.append(engine)
        for reference in engine.get("resident_adapters", ()):
            resident_on.setdefault(reference, []).append(engine.get("boot_id", ""))
    return Snapshot(
        sample={
            "at": round(time.time(), 3),
            "engine": engine_totals(found),
            "seconds": gateway.metrics.live.latencies(),
        },
        requests=gateway.metrics.live.view(),
        status={"engines": engines, "training": training},
        jobs=[await _with_history(gateway, job) for job in jobs] if jobs is not None else None,
        adapters=adapters,
        resident_on=resident_on,
    )


async def _jobs(trainer: TrainerPort, owners: frozenset[str | None]) -> list[trainer_pb2.Job]:
    """Open jobs and the newest of each owner, the newest first: one owner's many do not hide another's."""
    pages = await asyncio.gather(
        trainer.queue(), *(trainer.list(_JOBS_SHOWN, owner=owner) for owner in owners)
    )
    found = {job.id: job for page in pages for job in page}
    return sorted(found.values(), key=lambda job: job.created_at_s, reverse=True)


async def _with_history(gateway: Gateway, job: trainer_pb2.Job) -> trainer_pb2.Job:
    """A list of jobs comes without histories; the curves of the running one are wanted."""
    if job.status != "running":
        return job
    return await _or_none(gateway.clients.trainer.get(job.id)) or job


async def _or_none(call: Awaitable[Result]) -> Result | None:
    try:
        return await asyncio.wait_for(call, _TIMEOUT_S)
    except (KilnError, TimeoutError):
        return None
