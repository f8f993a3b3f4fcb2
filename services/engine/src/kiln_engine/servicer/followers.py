"""Moves running requests on to what the names of their adapters mean now, if they asked for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from kiln_common.errors import KilnError
from kiln_engine.domain.adapter import AdapterChange, AdapterLease, AdapterUse, AdapterVersion
from kiln_engine.domain.ports import AdapterResidency
from kiln_engine.loop import EngineLoop
from kiln_engine.mailbox import Sink

log = structlog.get_logger()


@dataclass(eq=False)
class LiveRequest:
    """What the intake knows of a request that has not ended."""

    sink: Sink
    lease: AdapterLease | None = None
    # Set while the request waits for its grammar and its adapters; after that the loop has it.
    preparing: asyncio.Task[None] | None = None
    # Its adapters' scales, if it goes on with newer versions as they come.
    followed_scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Step:
    request_id: str
    request: LiveRequest
    lease: AdapterLease

    @property
    def change(self) -> AdapterChange:
        scales = self.request.followed_scales
        pairs = list(zip(self.lease.adapters, self.lease.slots, scales, strict=True))
        return AdapterChange(
            self.lease.adapters,
            tuple(AdapterUse(version.sha256, scale, version.name) for version, _, scale in pairs),
            tuple((slot, scale) for _, slot, scale in pairs),
        )


class Followers:
    """Lives on the asyncio thread. All requests that are behind move between the same two steps."""

    def __init__(self, loop: EngineLoop, adapters: AdapterResidency) -> None:
        self._loop = loop
        self._adapters = adapters
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def is_behind(self, request: LiveRequest) -> bool:
        """Whether a request that follows its adapters' names could go on with what they mean now."""
        if not request.followed_scales or request.lease is None or request.preparing is not None:
            return False
        return any(version.sha256 != self._newest(version).sha256 for version in request.lease.adapters)

    def move_later(self, live: Mapping[str, LiveRequest]) -> None:
        """Move those of `live` that are behind, as soon as the loop comes to it."""
        task = asyncio.create_task(self._move(live))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _move(self, live: Mapping[str, LiveRequest]) -> None:
        async with self._lock:
            steps = [
                _Step(request_id, request, lease)
                for request_id, request in list(live.items())
                if self.is_behind(request) and (lease := await self._hold_newest(request)) is not None
            ]
            if not steps:
                return
            try:
                has_moved = await asyncio.wrap_future(
                    self._loop.run_between_steps(
                        lambda: [self._loop.move(step.request_id, step.change) for step in steps]
                    )
                )
            except KilnError:  # the loop has ended, and every request with it
                has_moved = [False] * len(steps)
            for step, moved in zip(steps, has_moved, strict=True):
                self._swap_leases(step, is_alive=moved and live.get(step.request_id) is step.request)
        log.info("requests_moved", count=sum(has_moved))

    def _swap_leases(self, step: _Step, *, is_alive: bool) -> None:
        """Nothing works with the old slots any more, or with the new ones where the request has ended."""
        released = step.lease
        if is_alive:
            assert step.request.lease is not None
            released, step.request.lease = step.request.lease, step.lease
        self._adapters.release(released)

    async def _hold_newest(self, request: LiveRequest) -> AdapterLease | None:
        assert request.lease is not None
        try:
            return await self._adapters.acquire([self._newest(version) for version in request.lease.adapters])
        except KilnError as error:  # it gave way meanwhile: the request keeps what it has
            log.info("request_not_moved", code=error.code)
            return None

    def _newest(self, version: AdapterVersion) -> AdapterVersion:
        return self._adapters.newest(version.name) or version
