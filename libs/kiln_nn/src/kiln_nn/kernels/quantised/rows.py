"""Rows of x in E4M3, which fp8's weights meet in tensor cores.

Legend: `T` tokens, `I` inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.quantised.reference import quantise_rtn


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows of x beside what they are rounded to, for readers of either.

    `x_TI`: as they are, `[T, I]`. `numbers_TI`: `float8_e4m3fn [T, I]`. `scales_T1`: float32 `[T, 1]`,
    by which a row's largest number is 448.
    """

    x_TI: torch.Tensor
    numbers_TI: torch.Tensor
    scales_T1: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """`[T, I]`."""
        return self.x_TI.shape


Rows = torch.Tensor | RoundedRows
"""Rows of x `[T, I]`."""


def whole(x: Rows) -> torch.Tensor:
    """The rows as they are."""
    return x.x_TI if isinstance(x, RoundedRows) else x


def round_rows(x: Rows) -> RoundedRows:
    """The rows with what they are rounded to; by a kernel of its own on GPUs, which must have E4M3."""
    if isinstance(x, RoundedRows):
        return x
    if takes_triton(x):
        from kiln_nn.kernels.quantised.triton import quantise_rows

        return RoundedRows(x, *quantise_rows(x))
    rounded = quantise_rtn(x, "fp8")
    return RoundedRows(x, rounded.values, rounded.scales)
