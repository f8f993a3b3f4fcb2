"""Four-bit rounding that lets later inputs make up for the errors of earlier ones.

What counts is the error of the layer's outputs on inputs as they occur, whose second moments are
`H = X^T X`. Inputs are rounded one after the other, and what rounding one has changed in the outputs
is taken back, as far as it can be, by the weights of those that follow. Scales are chosen for each
group when its turn comes, by the same measure.

Legend: `O` outputs, `I` inputs of a layer, `T` tokens.

Paper: Frantar et al. 2022, GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import torch

from kiln_nn.errors import InvalidQuantization
from kiln_nn.kernels.quantised import GROUP_INPUTS, QuantisedMatrix
from kiln_nn.kernels.quantised.matrix import pack_int4

_LEAST, _LARGEST = -8, 7
_LEAST_SCALE = 1e-30  # of a group of zeros
# Cutting a group's largest weights a little makes the steps of all others finer.
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


class Curvature:
    """Second moments `[I, I]` of what a layer reads, summed over calibration tokens in float32."""

    def __init__(self) -> None:
        self._sum_II: torch.Tensor | None = None

    def add(self, x_TI: torch.Tensor) -> None:
        """Count these inputs."""
        x_TI = x_TI.float()
        if self._sum_II is None:
            self._sum_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        self._sum_II.addmm_(x_TI.t(), x_TI)

    def inverse_factor(self, damping: float = 0.01) -> torch.Tensor:
        """Upper triangular U `[I, I]` with `U^T U = (H + damping * mean(diag H))^-1`.

        Damping keeps inputs that the text hardly used from being paid for with everything else; where
        float32 cannot invert the sum, there is more of it.

        Raises:
            InvalidQuantization: that does not help, as with activations that are not finite.
        """
        assert self._sum_II is not None, "nothing was counted"
        diagonal = self._sum_II.diagonal()
        for more in (1, 10, 100):
            added = (more * damping * diagonal.mean() + 1e-12).expand_as(diagonal)
            try:
                factor = torch.linalg.cholesky(self._sum_II + torch.diag_embed(added))
                return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
            except torch.linalg.LinAlgError:
                continue
        raise InvalidQuantization("the inputs of a layer on the calibration text have no usable statistics")


def gptq(weight_OI: torch.Tensor, inverse_factor_II: torch.Tensor) -> QuantisedMatrix:
    """The weight in four bits, its scales in bfloat16; the inputs must be whole groups.

    `inverse_factor_II`: of the curvature of what the layer reads; one for all layers that read the same.
    """
    left_OI = weight_OI.float().clone()
    numbers, scales = [], []
    for start in range(0, left_OI.shape[1], GROUP_INPUTS):
        group = slice(start, start + GROUP_INPUTS)
        factor = inverse_factor_II[group, group]
        scale_O1 = _scale(left_OI[:, group], factor.diagonal())
        rounded, errors = _round_group(left_OI[:, group], factor, scale_O1)
        left_OI[:, group.stop :] -= errors @ inverse_factor_II[group, group.stop :]
        numbers.append(rounded)
        scales.append(scale_O1)
    return QuantisedMatrix("int4", pack_int4(torch.cat(numbers, 1)), torch.cat(scales, 1).bfloat16())


def _scale(group_OI: torch.Tensor, factor_I: torch.Tensor) -> torch.Tensor:
    """The scale `[O, 1]` that rounds the group with the least error, as the inputs weigh it."""
    widest_O1 = (group_OI.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(_LEAST_SCALE)
    best_O1, least_O1 = widest_O1, torch.full_like(widest_O1, torch.inf)
    for shrink in _SHRINKS:
        scale_O1 = (widest_O1 * shrink).bfloat16().float()
        error_OI = group_OI - _round(group_OI, scale_O1) * scale_O1
        error_O1 = (error_OI / factor_I).square().sum(1, keepdim=True)
        best_O1 = torch.where(error_O1 < least_O1, scale_O1, best_O1)
        least_O1 = torch.minimum(error_O1, least_O1)
    return best_O1


def _round_group(
    group_OI: torch.Tensor, factor_II: torch.Tensor, scale_O1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The group's numbers, and the errors that its followers must make up for."""
    left_OI = group_OI.clone()
    numbers_OI, errors_OI = torch.empty_like(left_OI), torch.empty_like(left_OI)
    for i in range(left_OI.shape[1]):
        column = left_OI[:, i : i + 1]
        number = _round(column, scale_O1)
        error = (column - number * scale_O1) / factor_II[i, i]
        left_OI[:, i + 1 :].addmm_(error, factor_II[i : i + 1, i + 1 :], alpha=-1)
        numbers_OI[:, i : i + 1], errors_OI[:, i : i + 1] = number, error
    return numbers_OI, errors_OI


def _round(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).round().clamp(_LEAST, _LARGEST)
