"""Tells the registry which versions jobs wait on, so that none of them is collected."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

import redis
import structlog

from kiln_common.adapter_names import BASE_NAME
from kiln_common.errors import KilnError
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.store import JobStore

log = structlog.get_logger()

_INTERVAL_S = 10.0
# So long a queue may wait for a trainer to come back.
_HELD_S = 7 * 24 * 3600.0


class HoldingRegistry(Protocol):
    async def hold(self, holder: str, references: Iterable[str], *, for_s: float) -> None: ...


class HeldVersions:
    """Reports what the queued and running jobs need. Every trainer does, for the queue is everybody's."""

    def __init__(self, store: JobStore, registry: HoldingRegistry) -> None:
        self._store = store
        self._registry = registry
        self._held: set[str] = set()

    async def run(self) -> None:
        """Report every few seconds, until cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(_INTERVAL_S)

    async def report(self) -> None:
        """Report once; Redis or the registry being away costs nothing but this report."""
        try:
            jobs = await asyncio.to_thread(self._store.list_open)
            needed = {reference for job in jobs for reference in versions_needed(job)}
            if needed or self._held:
                await self._registry.hold("trainers", sorted(needed), for_s=_HELD_S)
            self._held = needed
        except (KilnError, redis.RedisError, OSError) as error:
            log.info("versions_not_held", reason=str(error))


def versions_needed(job: trainer_pb2.Job) -> list[str]:
    """What an open job starts from and learns from, as references."""
    start = job.config.base_adapter or ("" if job.config.start_fresh else job.config.adapter)
    needed = [job.resolved_base_adapter or start, job.opd_settings.teacher]
    return [reference for reference in needed if reference not in ("", BASE_NAME)]
