"""A row's random numbers: a function of its seed and the index of the token, of nothing else.

Made on the host in integers, so that neither the neighbours in the batch nor the device can
change them. The generator is a counter run twice through SplitMix64's finaliser.

Paper: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators.
Legend: `R` rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform_draw(seed: int, output_index: int) -> float:
    """The row's number in [0, 1) for the token at `output_index` of its completion, 53 bits."""
    return float(uniform_draws([seed], [output_index])[0])


def uniform_draws(seeds: Sequence[int], output_indices: Sequence[int]) -> np.ndarray:
    """`uniform_draw` of many rows, float64 `[R]`. Integers wrap at 64 bits, as the generator wants."""
    seeds_R = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
    counters_R = np.array(output_indices, dtype=np.uint64) + np.uint64(1)
    bits_R = _mix(_mix(seeds_R + _GOLDEN) + counters_R * _GOLDEN)
    return (bits_R >> np.uint64(11)) * 2.0**-53


def _mix(x_R: np.ndarray) -> np.ndarray:
    x_R = (x_R ^ (x_R >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_R = (x_R ^ (x_R >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_R ^ (x_R >> np.uint64(31))
