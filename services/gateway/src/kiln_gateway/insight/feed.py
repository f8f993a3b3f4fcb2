"""What dashboards are shown: read once a second for all of them together, and not at all without one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from kiln_common.pb import registry_pb2, trainer_pb2

log = structlog.get_logger()
_INTERVAL_S = 1.0
# Samples kept for those who come later: ten minutes.
_HISTORY = 600


@dataclass(frozen=True)
class Snapshot:
    """How everything stood at one moment. `jobs` and `adapters` are None where their owner was away.

    `jobs` are all open ones, and the newest of each owner who watches.
    `resident_on` lists engines (boot ids) by the "name@version" that they hold.
    """

    sample: dict[str, Any]  # numbers that are drawn over time
    requests: dict[str, list[tuple[str, dict[str, Any]]]]  # each with its owner
    status: dict[str, Any]
    jobs: list[trainer_pb2.Job] | None
    adapters: list[registry_pb2.Adapter] | None
    resident_on: dict[str, list[str]]


class Feed:
    """Reads snapshots with `read` while somebody watches; `history` has the latest samples.

    `read` is told who watches: owners, and None for those who see everybody's jobs.
    """

    def __init__(self, read: Callable[[frozenset[str | None]], Awaitable[Snapshot]]) -> None:
        self._read = read
        self._latest: Snapshot | None = None
        self._changed = asyncio.Event()
        self._watchers: Counter[str | None] = Counter()
        self._task: asyncio.Task[None] | None = None
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is read now."""
        return self._task is None

    @property
    def num_watchers(self) -> int:
        return self._watchers.total()

    async def watch(self, owner: str | None) -> AsyncIterator[Snapshot]:
        """Snapshots as they are read; a slow watcher misses some, never the latest."""
        async with self._reading(owner):
            seen: Snapshot | None = None
            while True:
                changed = self._changed
                if self._latest is not None and self._latest is not seen:
                    seen = self._latest
                    yield seen
                else:
                    await changed.wait()

    @contextlib.asynccontextmanager
    async def _reading(self, owner: str | None) -> AsyncIterator[None]:
        self._watchers[owner] += 1
        if self._task is None:
            self._latest = None
            self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._watchers[owner] -= 1
            self._watchers += Counter()  # forgets who watches no more
            if not self.num_watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _run(self) -> None:
        has_failed = False
        while True:
            try:
                self._latest = await self._read(frozenset(self._watchers))
            except Exception as error:  # a bug here must not end every watcher's stream
                if not has_failed:
                    log.error("feed_failed", exc_info=error)
                has_failed = True
            else:
                has_failed = False
                self.history.append(self._latest.sample)
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            await asyncio.sleep(_INTERVAL_S)
