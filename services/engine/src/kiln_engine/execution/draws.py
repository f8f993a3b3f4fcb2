"""A row's random numbers: a function of its seed and the index of the token, of nothing else.

Made on the host in integers, so that neither the neighbours in the batch nor the device can
change them. The generator is a counter run twice through SplitMix64's finaliser.

Paper: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform_draw(seed: int, output_index: int) -> float:
    """The row's number in [0, 1) for the token at `output_index` of its completion, 53 bits."""
    stream = _mix((seed + _GOLDEN) & _MASK)
    bits = _mix((stream + (output_index + 1) * _GOLDEN) & _MASK)
    return (bits >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
