"""A histogram cheap enough for every token, and its wire form."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kiln_common.pb import common_pb2

# From a token of a small model to a long job's swap, in seconds.
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts values by bucket. One thread writes; a reader on another may miss the latest value."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, upper_bounds: Sequence[float]) -> None:
        self._bounds = tuple(upper_bounds)
        self._counts = [0] * (len(upper_bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def to_proto(self) -> common_pb2.Histogram:
        return common_pb2.Histogram(upper_bounds=self._bounds, counts=self._counts, sum=self._sum)
