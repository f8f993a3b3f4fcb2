"""Whole quantised matrices back to bf16, and rows of x to E4M3, in Triton.

Both move bytes and little else: a program takes a part of a row. Exact against the references but
for the rounding of products (weights) and of quotients (x) to their formats.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import (
    launch_options,
    start_dependents,
    supports_dependent_launch,
    wait_for_producers,
)
from kiln_nn.kernels.quantised.matrix import FP8, GROUP_INPUTS, QuantisedMatrix

_LARGEST = tl.constexpr(448.0)
_ROW_INPUTS = 1024  # inputs of a program, at most
_GROUPS_A_PROGRAM = 8


@triton.jit
def decode_e4m3(byte):
    """The float32 that eight bits stand for; both NaNs become ±480."""
    bits = byte.to(tl.int32)
    # Exponent and fraction under float32's, whose bias is 120 larger; E4M3's smallest come out right too.
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def e4m3_rows(x):
    """Of float32 rows `[R, I]`: what E4M3 is to hold of them, not rounded to it yet, and their scales."""
    scales = tl.maximum(tl.max(tl.abs(x), 1) / _LARGEST, 1e-30)
    return tl.minimum(tl.maximum(x / scales[:, None], -_LARGEST), _LARGEST), scales


@triton.jit
def e4m3_groups(x, GROUP: tl.constexpr):
    """As `e4m3_rows` for one row, `[I]`, with a scale for each `GROUP` inputs, `[I / GROUP]`."""
    numbers, scales = e4m3_rows(x.reshape([x.shape[0] // GROUP, GROUP]))
    return numbers.reshape([x.shape[0]]), scales


@triton.jit
def in_order(numbers, BY_WORD: tl.constexpr):
    """Rounded rows `[R, I]` as they are to lie, by word as in `matrix.word_order`."""
    if BY_WORD:
        inputs = numbers.reshape([numbers.shape[0], numbers.shape[1] // 64, 4, 16])
        numbers = tl.permute(inputs, (0, 1, 3, 2)).reshape(numbers.shape)
    return numbers


@triton.jit
def _dequantise_kernel(
    values_ptr,
    scales_ptr,
    out_ptr,
    num_inputs,
    value_stride,
    scale_stride,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    FOUR_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if FOUR_BITS:
        words = tl.program_id(1) * (INPUTS // 8) + tl.arange(0, INPUTS // 8)
        word = tl.load(values_ptr + row * value_stride + words, mask=words * 8 < num_inputs, other=0)
        numbers = ((word[:, None] >> (4 * tl.arange(0, 8)[None, :])) & 15) - 8
        # Place i of word w in eight words is input 8 i + w of their 64: in order, lines are stored whole.
        numbers = tl.permute(numbers.reshape([INPUTS // 64, 8, 8]), (0, 2, 1)).reshape([INPUTS])
        cols = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
        is_there = cols < num_inputs
        scale = tl.load(scales_ptr + row * scale_stride + cols // GROUP, mask=is_there, other=0.0)
        weights = numbers.to(tl.float32) * scale.to(tl.float32)
        tl.store(out_ptr + row * num_inputs + cols, weights.to(out_ptr.dtype.element_ty), mask=is_there)
    else:
        cols = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
        is_there = cols < num_inputs
        byte = tl.load(values_ptr + row * value_stride + cols, mask=is_there, other=0)
        weights = decode_e4m3(byte) * tl.load(scales_ptr + row * scale_stride)
        tl.store(out_ptr + row * num_inputs + cols, weights.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _quantise_rows_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    num_inputs,
    x_stride,
    INPUTS: tl.constexpr,
    BY_WORD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    rows = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    cols = tl.arange(0, INPUTS)[None, :]
    is_there = cols < num_inputs
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=is_there, other=0.0).to(tl.float32)
    numbers, scales = e4m3_rows(x)
    places = rows[:, None] * num_inputs + cols
    tl.store(out_ptr + places, in_order(numbers.to(out_ptr.dtype.element_ty), BY_WORD), mask=is_there)
    tl.store(scales_ptr + rows, scales)


@triton.jit
def _quantise_groups_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    num_inputs,
    x_stride,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_there = cols < num_inputs
    x = tl.load(x_ptr + row * x_stride + cols, mask=is_there, other=0.0).to(tl.float32)
    numbers, scales = e4m3_rows(x)
    tl.store(out_ptr + row * num_inputs + cols, numbers.to(out_ptr.dtype.element_ty), mask=is_there)
    place = groups * tl.num_programs(0) + row
    tl.store(scales_ptr + place, scales, mask=groups * GROUP < num_inputs)


def dequantise(matrix: QuantisedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """As `QuantisedMatrix.dequantise`."""
    num_outputs, num_inputs = matrix.shape
    is_four_bits = matrix.values.dtype is not FP8
    out = matrix.values.new_empty((num_outputs, num_inputs), dtype=dtype)
    inputs = min(_ROW_INPUTS, triton.next_power_of_2(num_inputs))
    _dequantise_kernel[(num_outputs, triton.cdiv(num_inputs, inputs))](
        matrix.values if is_four_bits else matrix.values.view(torch.uint8),
        matrix.scales,
        out,
        num_inputs,
        matrix.values.stride(0),
        matrix.scales.stride(0),
        INPUTS=inputs,
        GROUP=GROUP_INPUTS,
        FOUR_BITS=is_four_bits,
        num_warps=2,
    )
    return out


def quantise_rows(x_TI: torch.Tensor, order: str = "plain") -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's x as E4M3 `[T, I]` and its scale, float32 `[1, T]`; on GPUs that have the format.

    By `order` "words" inputs, in whole 64, lie as in `word_order`.
    """
    num_tokens, num_inputs = x_TI.shape
    numbers = x_TI.new_empty((num_tokens, num_inputs), dtype=FP8)
    scales = x_TI.new_empty((1, num_tokens), dtype=torch.float32)
    inputs = triton.next_power_of_2(num_inputs)
    # Its launch hides behind the kernel before, that of an own product behind it; the library's comes the usual way.
    dependent = launch_options(supports_dependent_launch(x_TI.device))
    _quantise_rows_kernel[(num_tokens,)](
        x_TI,
        numbers,
        scales,
        num_inputs,
        x_TI.stride(0),
        INPUTS=inputs,
        BY_WORD=order == "words",
        num_warps=8,
        **dependent,
    )
    return numbers, scales


def quantise_groups(x_TI: torch.Tensor, out_TI: torch.Tensor, scales_GT: torch.Tensor) -> None:
    """Fill `out` with x as E4M3 and `scales` with one for each 128 inputs; on GPUs that have the format.

    Nobody waits for a whole row, so that several programs share it.
    """
    num_tokens, num_inputs = x_TI.shape
    num_programs = triton.cdiv(num_inputs, _GROUPS_A_PROGRAM * GROUP_INPUTS)
    dependent = launch_options(supports_dependent_launch(x_TI.device))
    _quantise_groups_kernel[(num_tokens, num_programs)](
        x_TI,
        out_TI,
        scales_GT,
        num_inputs,
        x_TI.stride(0),
        GROUP=GROUP_INPUTS,
        GROUPS=_GROUPS_A_PROGRAM,
        num_warps=4,
        **dependent,
    )
