"""The bounded way from the loop's thread to one client's stream."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from kiln_engine.domain.errors import SessionOverflow
from kiln_engine.domain.result import SequenceEvent


class Outbox:
    """Holds the events of at most `capacity` steps for a reader on an asyncio loop.

    `offer` may be called from any thread and never waits. Once it was full, or closed, it takes
    nothing more: the reader meets SessionOverflow, and whoever writes learns it from the False.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._batches: deque[list[SequenceEvent]] = deque()
        self._has_news = asyncio.Event()
        self._is_waking = False
        self._has_overflowed = False
        self._is_closed = False

    def offer(self, events: list[SequenceEvent]) -> bool:
        """Add one step's events; False when the outbox was full or is closed."""
        with self._lock:
            if self._is_closed or self._has_overflowed:
                return False
            if len(self._batches) >= self._capacity:
                self._has_overflowed = True
            else:
                self._batches.append(events)
            if not self._is_waking and not self._loop.is_closed():
                self._is_waking = True
                self._loop.call_soon_threadsafe(self._has_news.set)
            return not self._has_overflowed

    def close(self) -> None:
        """Take nothing more, drop what is left and let the reader end."""
        with self._lock:
            self._is_closed = True
            self._batches.clear()
        self._has_news.set()

    async def take(self) -> list[SequenceEvent] | None:
        """The next step's events, in order; None once the outbox was closed.

        Raises:
            SessionOverflow: the outbox was full; what it held is gone.
        """
        while True:
            with self._lock:
                if self._has_overflowed:
                    self._batches.clear()
                    raise SessionOverflow(f"{self._capacity} steps were not read in time")
                if self._is_closed:
                    return None
                if self._batches:
                    return self._batches.popleft()
                self._is_waking = False
                self._has_news.clear()
            await self._has_news.wait()
