"""Rows of x in E4M3, which weights meet in tensor cores: those of fp8, and four-bit ones that become E4M3.

Legend: `T` tokens, `I` inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.quantised.matrix import word_order
from kiln_nn.kernels.quantised.reference import quantise_rtn

InputOrder = Literal["plain", "words"]
"""How rounded inputs lie: one after the other, or as `word_order` says."""


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows of x beside what they are rounded to, for readers of either.

    `x_TI`: as they are, `[T, I]`. `numbers_TI`: `float8_e4m3fn [T, I]`, its inputs in `order`.
    `scales_T1`: float32 `[T, 1]`, by which a row's largest number is 448.
    """

    x_TI: torch.Tensor
    numbers_TI: torch.Tensor
    scales_T1: torch.Tensor
    order: InputOrder = "plain"

    @property
    def shape(self) -> torch.Size:
        """`[T, I]`."""
        return self.x_TI.shape


Rows = torch.Tensor | RoundedRows
"""Rows of x `[T, I]`."""


def whole(x: Rows) -> torch.Tensor:
    """The rows as they are."""
    return x.x_TI if isinstance(x, RoundedRows) else x


def round_rows(x: Rows, order: InputOrder = "plain") -> RoundedRows:
    """The rows with what they are rounded to; by a kernel of its own on GPUs, which must have E4M3."""
    if isinstance(x, RoundedRows) and x.order == order:
        return x
    x_TI = whole(x)
    if takes_triton(x_TI):
        from kiln_nn.kernels.quantised.triton import quantise_rows

        return RoundedRows(x_TI, *quantise_rows(x_TI, order), order)
    rounded = quantise_rtn(x_TI, "fp8")
    numbers_TI = rounded.values if order == "plain" else _in_word_order(rounded.values)
    return RoundedRows(x_TI, numbers_TI, rounded.scales, order)


def _in_word_order(numbers_TI: torch.Tensor) -> torch.Tensor:
    return word_order(numbers_TI.view(torch.uint8)).view(numbers_TI.dtype)
