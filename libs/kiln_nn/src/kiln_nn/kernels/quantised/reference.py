"""Rounding weights to the nearest number of a quantised format, in plain torch.

Legend: `I` inputs, `O` outputs, `G` groups of inputs.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.quantised.matrix import FP8, GROUP_INPUTS, QuantisedMatrix, Scheme, pack_int4

# The largest number of each format that a group's largest weight becomes. Four bits reach -8, but
# only to one side: up to 7 no weight is cut off, and a weight and its negative stay opposites.
_LARGEST: dict[Scheme, float] = {"fp8": torch.finfo(FP8).max, "int4": 7.0}
_LEAST_SCALE = 1e-30  # of a group of zeros


def quantise_rtn(w_OI: torch.Tensor, scheme: Scheme) -> QuantisedMatrix:
    """Each weight as the nearest number under the scale by which its group's largest fits.

    Quantising the float32 weights of the result again gives the same numbers. Scales of int4 are
    rounded to bf16 before the weights are, unless these are in float32.

    Raises:
        ShapeMismatch: the inputs for int4 are not whole groups.
    """
    num_inputs = w_OI.shape[1]
    size = num_inputs if scheme == "fp8" else GROUP_INPUTS
    check_shape("weight", w_OI, (None, num_inputs // size * size))
    grouped_OGI = w_OI.float().unflatten(1, (-1, size))
    largest_OG = grouped_OGI.abs().amax(-1)
    # On a GPU a number of the host would be multiplied by its reciprocal, and scales would differ by a bit.
    scales = (largest_OG / largest_OG.new_full((), _LARGEST[scheme])).clamp_min(_LEAST_SCALE)
    if scheme == "fp8":
        largest = _LARGEST[scheme]
        numbers = (grouped_OGI / scales[..., None]).clamp(-largest, largest).flatten(1)
        return QuantisedMatrix(scheme, numbers.to(FP8), scales)
    if w_OI.dtype is not torch.float32:
        scales = scales.bfloat16()
    numbers = (grouped_OGI / scales.float()[..., None]).round().clamp(-8, 7).flatten(1)
    return QuantisedMatrix(scheme, pack_int4(numbers), scales)
