"""Time as the loop knows it."""

from __future__ import annotations

import time


class MonotonicClock:
    """The process's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
