"""Means with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (normal approximation, for 30 samples or more)."""

    mean: float
    low: float
    high: float
    num_samples: int

    def is_above(self, other: Interval) -> bool:
        """Whether the two intervals do not touch and this one is higher."""
        return self.low > other.high

    def as_dict(self) -> dict[str, float | int]:
        return {
            "mean": round(self.mean, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "samples": self.num_samples,
        }


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of `values`; needs at least two."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half_width = 1.96 * math.sqrt(variance / count)
    return Interval(mean, mean - half_width, mean + half_width, count)
