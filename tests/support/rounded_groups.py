"""Rows that a kernel rounds to E4M3 where it makes them, 128 outputs at a time."""

from __future__ import annotations

import torch

from kiln_nn.kernels.quantised import RoundedRows


def check_groups(rows: object, expected_TI: torch.Tensor, padding: int) -> None:
    """The rows are the expected ones, and rounded as by themselves; that of number `padding` is zero."""
    from kiln_nn.kernels.quantised.triton import quantise_rows

    assert isinstance(rows, RoundedRows)
    assert torch.equal(rows.x_TI, expected_TI)
    assert rows.has_groups
    numbers, scales = quantise_rows(expected_TI.view(-1, 128))
    used = [row for row in range(len(expected_TI)) if row != padding]
    assert torch.equal(rows.numbers_TI.float()[used], numbers.float().view(expected_TI.shape)[used])
    assert torch.equal(rows.scales_GT.t()[used], scales.view(len(expected_TI), -1)[used])
    assert not rows.dequantise()[padding].any()
