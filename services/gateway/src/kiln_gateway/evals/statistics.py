"""How sure a score is, and whether one version is better than another. Confidence is 95 % throughout.

A mean of right and wrong gets Wilson's interval (E. B. Wilson 1927), any other mean a bootstrap.
Two versions are compared case by case: by McNemar's exact test (Q. McNemar 1947) where every score
is right or wrong, otherwise by flipping the signs of the differences at random; the difference's
interval is a paired bootstrap (B. Efron 1979) either way. Everything random is seeded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_NUM_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    low: float
    high: float
    method: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """`difference` is the candidate's mean less the baseline's; the counts are of cases."""

    difference: Interval
    num_better: int
    num_worse: int
    num_same: int
    p_value: float
    test: str


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of one score a case, and where it would lie for other cases of the same kind."""
    mean = sum(scores) / len(scores)
    if _is_binary(scores):
        low, high = wilson(round(sum(scores)), len(scores))
        return Interval(mean, low, high, "wilson")
    low, high = _bootstrap(scores)
    return Interval(mean, low, high, "bootstrap")


def wilson(num_right: int, num_cases: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    share = num_right / num_cases
    scale = 1 + _Z**2 / num_cases
    center = (share + _Z**2 / (2 * num_cases)) / scale
    margin = _Z / scale * math.sqrt(share * (1 - share) / num_cases + _Z**2 / (4 * num_cases**2))
    return max(0.0, center - margin), min(1.0, center + margin)


def compare(baseline: Sequence[float], candidate: Sequence[float]) -> Comparison:
    """Two versions on the same cases in the same order."""
    differences = [new - old for old, new in zip(baseline, candidate, strict=True)]
    num_better = sum(difference > 0 for difference in differences)
    num_worse = sum(difference < 0 for difference in differences)
    low, high = _bootstrap(differences)
    if _is_binary(baseline) and _is_binary(candidate):
        p_value, test = mcnemar(num_better, num_worse), "mcnemar_exact"
    else:
        p_value, test = _sign_flips(differences), "paired_permutation"
    return Comparison(
        difference=Interval(sum(differences) / len(differences), low, high, "paired_bootstrap"),
        num_better=num_better,
        num_worse=num_worse,
        num_same=len(differences) - num_better - num_worse,
        p_value=p_value,
        test=test,
    )


def mcnemar(num_better: int, num_worse: int) -> float:
    """Two-sided exact p: cases that changed would go either way with probability one half."""
    num_changed = num_better + num_worse
    if num_changed == 0:
        return 1.0
    ways = term = 1
    for k in range(min(num_better, num_worse)):
        term = term * (num_changed - k) // (k + 1)
        ways += term
    # Integers to the last step: 2**n overflows a float beyond about a thousand changes.
    return min(1.0, float(2 * ways * 10**18 // 2**num_changed) / 1e18)


def _is_binary(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of the mean."""
    draw = random.Random(_SEED)
    size = len(values)
    means = sorted(sum(draw.choices(values, k=size)) / size for _ in range(_NUM_RESAMPLES))
    edge = round(0.025 * _NUM_RESAMPLES)
    return means[edge], means[-1 - edge]


def _sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of the mean difference when each case's sign is a coin's."""
    draw = random.Random(_SEED)
    changed = [difference for difference in differences if difference]
    observed = abs(sum(changed))
    num_as_large = 0
    for _ in range(_NUM_RESAMPLES):
        flipped = sum(value if draw.random() < 0.5 else -value for value in changed)
        num_as_large += abs(flipped) >= observed - 1e-12
    return (num_as_large + 1) / (_NUM_RESAMPLES + 1)
