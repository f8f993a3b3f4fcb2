"""Rows of x in E4M3, which weights meet in tensor cores: those of fp8, and four-bit ones that become E4M3.

Legend: `T` tokens, `I` inputs, `G` groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.quantised.matrix import FP8, GROUP_INPUTS, word_order
from kiln_nn.kernels.quantised.reference import quantise_rtn

InputOrder = Literal["plain", "words"]
"""How rounded inputs lie: one after the other, or as `word_order` says."""


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows of x beside what they are rounded to, for readers of either.

    `x_TI`: as they are, `[T, I]`. `numbers_TI`: `float8_e4m3fn [T, I]`, its inputs in `order`.
    `scales_GT`: float32 `[G, T]`, contiguous: by which a row's largest number is 448 (`G` is 1), or that of each
    128 inputs of it.
    """

    x_TI: torch.Tensor
    numbers_TI: torch.Tensor
    scales_GT: torch.Tensor
    order: InputOrder = "plain"

    @property
    def shape(self) -> torch.Size:
        """`[T, I]`."""
        return self.x_TI.shape

    @property
    def has_groups(self) -> bool:
        """Whether a row has more than one scale."""
        return self.scales_GT.shape[0] > 1

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the numbers stand for, `[T, I]`, in their order."""
        groups = self.numbers_TI.to(dtype).unflatten(1, (self.scales_GT.shape[0], -1))
        return (groups * self.scales_GT.t()[:, :, None].to(dtype)).flatten(1)


Rows = torch.Tensor | RoundedRows
"""Rows of x `[T, I]`."""


def unwritten_groups(x_TI: torch.Tensor) -> RoundedRows:
    """The rows beside memory for what they are to be rounded to, with a scale for each 128 inputs."""
    num_tokens, num_inputs = x_TI.shape
    return RoundedRows(
        x_TI,
        x_TI.new_empty(x_TI.shape, dtype=FP8),
        x_TI.new_empty((num_inputs // GROUP_INPUTS, num_tokens), dtype=torch.float32),
    )


def whole(x: Rows) -> torch.Tensor:
    """The rows as they are."""
    return x.x_TI if isinstance(x, RoundedRows) else x


def round_groups(x: Rows) -> RoundedRows:
    """The rows with what they are rounded to, in whole groups of 128 inputs with a scale each.

    By a kernel of its own on GPUs, which must have E4M3. Rows that have been rounded before stay as they are.
    """
    if isinstance(x, RoundedRows) and x.order == "plain":
        return x
    rows = unwritten_groups(whole(x))
    if takes_triton(rows.x_TI):
        from kiln_nn.kernels.quantised.triton import quantise_groups

        quantise_groups(rows.x_TI, rows.numbers_TI, rows.scales_GT)
        return rows
    rounded = quantise_rtn(rows.x_TI.reshape(-1, GROUP_INPUTS), "fp8")
    rows.numbers_TI.copy_(rounded.values.view(rows.shape))
    rows.scales_GT.copy_(rounded.scales.view(len(rows.x_TI), -1).t())
    return rows


def round_rows(x: Rows, order: InputOrder = "plain") -> RoundedRows:
    """The rows with what they are rounded to; by a kernel of its own on GPUs, which must have E4M3."""
    if isinstance(x, RoundedRows) and x.order == order and not x.has_groups:
        return x
    x_TI = whole(x)
    if takes_triton(x_TI):
        from kiln_nn.kernels.quantised.triton import quantise_rows

        return RoundedRows(x_TI, *quantise_rows(x_TI, order), order)
    rounded = quantise_rtn(x_TI, "fp8")
    numbers_TI = rounded.values if order == "plain" else _in_word_order(rounded.values)
    return RoundedRows(x_TI, numbers_TI, rounded.scales.view(1, -1), order)


def _in_word_order(numbers_TI: torch.Tensor) -> torch.Tensor:
    return word_order(numbers_TI.view(torch.uint8)).view(numbers_TI.dtype)
