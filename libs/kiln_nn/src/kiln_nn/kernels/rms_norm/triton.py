"""Root-mean-square norms in Triton: plain, with the residual addition in front, and gated.

Paper: Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
Takes float32, bf16 and fp16 of any width up to 16,384 whose last dimension is contiguous and
whose leading dimensions lie at one distance from row to row; weights in any of these formats.
Arithmetic is float32, the result is rounded once. The residual sum is rounded before it is
normed, as the reference does. A residual may be met by several partial sums, which are added in
their order first. A row can also be written in E4M3, with its scale: the whole of it is in registers.

Measured against float64 under the interpreter: 2e-7 relative in float32. bf16: one rounding.

Legend: `N` rows, `D` normalised width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import (
    launch_options,
    start_dependents,
    supports_dependent_launch,
    wait_for_producers,
)
from kiln_nn.kernels.quantised import FP8, InputOrder, RoundedRows
from kiln_nn.kernels.quantised.triton import e4m3_rows, in_order

_WIDEST = 16384
_ELEMENTS_PER_PROGRAM = 2048
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    numbers_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    partial_stride,
    residual_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROUNDED: tl.constexpr,
    BY_WORD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_width = cols < WIDTH
    mask = (rows[:, None] < num_rows) & in_width[None, :]
    x_ptrs = x_ptr + rows[:, None] * x_stride + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTIALS):
        x += tl.load(x_ptrs + part * partial_stride, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    places = rows[:, None] * WIDTH + cols[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        total = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + places, total, mask=mask)
        x = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    out = (x * inverse[:, None] * (offset + weight)[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, out, mask=mask)
    if ROUNDED:
        numbers, scales = e4m3_rows(out.to(tl.float32))
        numbers = in_order(numbers.to(numbers_ptr.dtype.element_ty), BY_WORD)
        tl.store(numbers_ptr + places, numbers, mask=mask)
        tl.store(scales_ptr + rows, scales, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_norm_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride,
    z_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_width = cols < WIDTH
    mask = (rows[:, None] < num_rows) & in_width[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + rows[:, None] * z_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    out = x * inverse[:, None] * weight[None, :] * (z * tl.sigmoid(z))
    places = rows[:, None] * WIDTH + cols[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)


def as_rows(x_D: torch.Tensor) -> torch.Tensor | None:
    """The tensor as `[N, D]` without copying, or None where its strides do not allow that."""
    if x_D.stride(-1) != 1:
        return None
    try:
        return x_D.view(-1, x_D.shape[-1])
    except RuntimeError:
        return None


def takes(weight_D: torch.Tensor, *inputs_D: torch.Tensor) -> bool:
    """Whether the kernels compute these shapes, formats and strides."""
    return (
        weight_D.shape[0] <= _WIDEST
        and weight_D.stride(0) == 1
        and all(x.dtype in _FORMATS for x in (weight_D, *inputs_D))
        and all(x.numel() and as_rows(x) is not None for x in inputs_D)
    )


def _tiling(x_ND: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and configuration: narrow rows share a program, however few there are.

    So a row is summed in the same order whatever the number of rows.
    """
    num_rows, width = x_ND.shape
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS_PER_PROGRAM // block)
    warps = max(1, min(8, rows * block // 256))
    grid = (triton.cdiv(num_rows, rows),)
    dependent = launch_options(supports_dependent_launch(x_ND.device))
    return grid, {"WIDTH": width, "BLOCK_D": block, "ROWS": rows, "num_warps": warps, **dependent}


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    out = x_D.new_empty(x_D.shape)
    _norm(x_D, None, weight_D, out, out, None, eps, offset)
    return out


def rms_norm_rounded(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float, order: InputOrder = "plain"
) -> RoundedRows:
    """The same, also in E4M3."""
    rows = _unwritten_rows(x_TD, order)
    _norm(x_TD, None, weight_D, rows.x_TI, rows.x_TI, rows, eps, offset)
    return rows


def add_rms_norm(
    x_D: torch.Tensor, residual_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, for inputs that `takes` accepts."""
    out, total = residual_D.new_empty(residual_D.shape), residual_D.new_empty(residual_D.shape)
    _norm(x_D, residual_D, weight_D, out, total, None, eps, offset)
    return out, total


def add_rms_norm_rounded(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    offset: float,
    order: InputOrder = "plain",
) -> tuple[RoundedRows, torch.Tensor]:
    """The same, also in E4M3."""
    rows, total = _unwritten_rows(residual_TD, order), residual_TD.new_empty(residual_TD.shape)
    _norm(x_TD, residual_TD, weight_D, rows.x_TI, total, rows, eps, offset)
    return rows, total


def _unwritten_rows(like_TD: torch.Tensor, order: InputOrder) -> RoundedRows:
    return RoundedRows(
        like_TD.new_empty(like_TD.shape),
        like_TD.new_empty(like_TD.shape, dtype=FP8),
        like_TD.new_empty((1, like_TD.shape[0]), dtype=torch.float32),
        order,
    )


def _norm(
    x_D: torch.Tensor,
    residual_D: torch.Tensor | None,
    weight_D: torch.Tensor,
    out_D: torch.Tensor,
    total_D: torch.Tensor,
    rounded: RoundedRows | None,
    eps: float,
    offset: float,
) -> None:
    """Fill `out_D`, with a residual `total_D`, and if rows are to be rounded what they are rounded to."""
    has_partials = x_D.dim() > out_D.dim()
    x = as_rows(x_D[0] if has_partials else x_D)
    residual = x if residual_D is None else as_rows(residual_D)
    assert x is not None
    assert residual is not None
    grid, tiling = _tiling(x)
    _norm_kernel[grid](
        x,
        residual,
        weight_D,
        out_D,
        total_D,
        out_D if rounded is None else rounded.numbers_TI,
        out_D if rounded is None else rounded.scales_GT,
        x.shape[0],
        x.stride(0),
        x_D.stride(0) if has_partials else 0,
        0 if residual_D is None else residual.stride(0),
        eps,
        offset,
        PARTIALS=x_D.shape[0] if has_partials else 1,
        HAS_RESIDUAL=residual_D is not None,
        ROUNDED=rounded is not None,
        BY_WORD=rounded is not None and rounded.order == "words",
        **tiling,
    )


def gated_rms_norm(x_D: torch.Tensor, z_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    x, z, out = as_rows(x_D), as_rows(z_D), z_D.new_empty(z_D.shape)
    assert x is not None
    assert z is not None
    grid, tiling = _tiling(x)
    _gated_norm_kernel[grid](x, z, weight_D, out, x.shape[0], x.stride(0), z.stride(0), eps, **tiling)
    return out
