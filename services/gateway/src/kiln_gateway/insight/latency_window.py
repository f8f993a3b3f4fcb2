"""Percentiles of durations over the last seconds, at a constant cost a duration."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

# Buckets grow by a tenth from 0.1 ms; the last one begins beyond ten minutes.
_LEAST_S = 1e-4
_GROWTH = 1.1
_NUM_BUCKETS = 170
_LOG_GROWTH = math.log(_GROWTH)


class LatencyWindow:
    """Durations of the last `window_s` whole seconds, by bucket: a percentile is within 5 % of the truth."""

    def __init__(self, window_s: int, now: Callable[[], float] = monotonic) -> None:
        self._window_s = window_s
        self._now = now
        self._counts: dict[int, list[int]] = {}  # by second

    def add(self, seconds: float) -> None:
        second = int(self._now())
        counts = self._counts.get(second)
        if counts is None:
            self._forget(second)
            counts = self._counts[second] = [0] * _NUM_BUCKETS
        counts[_bucket(seconds)] += 1

    def percentiles(self, *fractions: float) -> list[float | None]:
        """The duration in seconds that this fraction of them does not exceed; None without any."""
        self._forget(int(self._now()))
        totals = [sum(column) for column in zip(*self._counts.values(), strict=True)]
        return [_percentile(totals, sum(totals), fraction) for fraction in fractions]

    def _forget(self, second: int) -> None:
        for old in [known for known in self._counts if known <= second - self._window_s]:
            del self._counts[old]


def _bucket(seconds: float) -> int:
    if seconds <= _LEAST_S:
        return 0
    return min(_NUM_BUCKETS - 1, 1 + int(math.log(seconds / _LEAST_S) / _LOG_GROWTH))


def _percentile(counts: list[int], total: int, fraction: float) -> float | None:
    if not total:
        return None
    rank = max(1, math.ceil(total * fraction))
    for bucket, count in enumerate(counts):
        rank -= count
        if rank <= 0:
            # The geometric middle of the bucket.
            return _LEAST_S * _GROWTH ** (bucket - 0.5)
    return None
