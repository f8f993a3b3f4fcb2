"""Linear layers of few tokens over quantised weights in Triton, for GPUs other than Hopper's.

The tiles of triton.py. A tile of four-bit words is multiplied in eight products, one for each place
in a word, with the eight of every 64 inputs of x that have it. E4M3 is decoded by moving its bits into
a float32, which GPUs without that format can do too. Sums over a group of 128 inputs are scaled in
float32; E4M3's scale, one an output, comes last.

Takes bf16 x, contiguous in the inputs, with any row stride; quantised matrices likewise. Sums are
float32 and rounded once, in one order given by the configuration alone. Partial sums always stay
apart; the other forms do not split inputs. Its errors are tested in the interpreter; on a GPU it is
compiled for every supported one and not measured.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
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
from kiln_nn.kernels.dispatch import is_interpreted
from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton import multiply
from kiln_nn.kernels.quantised import FP8, GROUP_INPUTS, QuantisedMatrix
from kiln_nn.kernels.quantised.triton import decode_e4m3

_GROUP = tl.constexpr(GROUP_INPUTS)


@triton.jit
def _sum_four_bits(
    values_ptr,
    scales_ptr,
    x_ptr,
    rows,
    tokens,
    num_tokens,
    first,
    last,
    value_stride,
    scale_stride,
    x_stride,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Products over the groups of inputs `first` to `last`, `[OUTPUTS, TOKENS]`."""
    acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    words = tl.arange(0, _GROUP // 8)
    word_ptrs = values_ptr + rows[:, None] * value_stride + words[None, :]
    x_ptrs = x_ptr + (words // 8 * 64 + words % 8)[:, None] + tokens[None, :].to(tl.int64) * x_stride
    in_tokens = (tokens < num_tokens)[None, :]
    for start in range(first, last, _GROUP):
        word = tl.load(word_ptrs + start // 8, eviction_policy="evict_first")
        part = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        for place in tl.static_range(8):
            number = ((word >> (4 * place)) & 15) - 8
            x = tl.load(x_ptrs + start + 8 * place, mask=in_tokens, other=0.0, eviction_policy="evict_last")
            part = multiply(number.to(tl.float32).to(tl.bfloat16), x, part, INTERPRETED)
        scale = tl.load(scales_ptr + rows * scale_stride + start // _GROUP).to(tl.float32)
        acc += part * scale[:, None]
    return acc


@triton.jit
def _sum_eight_bits(
    values_ptr,
    scales_ptr,
    x_ptr,
    rows,
    tokens,
    num_tokens,
    first,
    last,
    value_stride,
    scale_stride,
    x_stride,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same over inputs of any number."""
    acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    cols = tl.arange(0, _GROUP)
    byte_ptrs = values_ptr + rows[:, None] * value_stride + cols[None, :]
    x_ptrs = x_ptr + cols[:, None] + tokens[None, :].to(tl.int64) * x_stride
    in_tokens = (tokens < num_tokens)[None, :]
    for start in range(first, last, _GROUP):
        in_inputs = start + cols < last
        byte = tl.load(byte_ptrs + start, mask=in_inputs[None, :], other=0)
        x = tl.load(x_ptrs + start, mask=in_inputs[:, None] & in_tokens, other=0.0)
        acc = multiply(decode_e4m3(byte).to(tl.bfloat16), x, acc, INTERPRETED)
    scale = tl.load(scales_ptr + rows * scale_stride)
    return acc * scale[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    split_inputs,
    x_stride,
    value_stride,
    scale_stride,
    out_stride,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SHOWS_PRODUCERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    split = tl.program_id(1)
    outputs = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows past the end read the last one again; their results are not stored.
    rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    first = split * split_inputs
    last = tl.minimum(first + split_inputs, num_inputs)
    if DEPENDENT:
        if not SHOWS_PRODUCERS:
            start_dependents()
        wait_for_producers()
        if SHOWS_PRODUCERS:
            start_dependents()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if FOUR_BITS:
        acc = _sum_four_bits(
            values_ptr,
            scales_ptr,
            x_ptr,
            rows,
            tokens,
            num_tokens,
            first,
            last,
            value_stride,
            scale_stride,
            x_stride,
            OUTPUTS,
            TOKENS,
            INTERPRETED,
        )
    else:
        acc = _sum_eight_bits(
            values_ptr,
            scales_ptr,
            x_ptr,
            rows,
            tokens,
            num_tokens,
            first,
            last,
            value_stride,
            scale_stride,
            x_stride,
            OUTPUTS,
            TOKENS,
            INTERPRETED,
        )
    if GATED:
        if FOUR_BITS:
            up = _sum_four_bits(
                values_ptr,
                scales_ptr,
                x_ptr,
                rows + num_outputs,
                tokens,
                num_tokens,
                first,
                last,
                value_stride,
                scale_stride,
                x_stride,
                OUTPUTS,
                TOKENS,
                INTERPRETED,
            )
        else:
            up = _sum_eight_bits(
                values_ptr,
                scales_ptr,
                x_ptr,
                rows + num_outputs,
                tokens,
                num_tokens,
                first,
                last,
                value_stride,
                scale_stride,
                x_stride,
                OUTPUTS,
                TOKENS,
                INTERPRETED,
            )
        acc = acc * tl.sigmoid(acc) * up
    places = (split.to(tl.int64) * num_tokens + tokens[None, :]) * out_stride + outputs[:, None]
    mask = (tokens < num_tokens)[None, :] & (outputs < num_outputs)[:, None]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


def takes(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether the kernel computes these formats and strides."""
    return (
        x_TI.dtype is torch.bfloat16
        and x_TI.numel() > 0
        and matrix.values.numel() > 0
        and x_TI.stride(1) == 1
        and matrix.values.stride(1) == 1
        and (matrix.scales.shape[1] == 1 or matrix.scales.stride(1) == 1)
    )


def launch(
    x_TI: torch.Tensor,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    is_gated: bool = False,
    is_dependent: bool | None = None,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` partial sums.

    The rows of `out` may lie apart, where it has two dimensions. `is_dependent=None` uses dependent
    launches where the device has them; `shows_producers` as in triton_hopper.py.
    """
    (num_tokens, num_inputs), num_rows = x_TI.shape, matrix.shape[0]
    is_four_bits = matrix.values.dtype is not FP8
    num_outputs = num_rows // (2 if is_gated else 1)
    if is_dependent is None:
        is_dependent = supports_dependent_launch(x_TI.device)
    options: dict[str, Any] = {
        "OUTPUTS": config.outputs,
        "TOKENS": max(16, config.tokens),
        "FOUR_BITS": is_four_bits,
        "GATED": is_gated,
        "SHOWS_PRODUCERS": shows_producers,
        "INTERPRETED": is_interpreted(),
        "num_warps": config.warps,
        "num_stages": config.stages,
        **launch_options(is_dependent),
    }
    grid = (
        triton.cdiv(num_tokens, options["TOKENS"]),
        config.splits,
        triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        x_TI,
        matrix.values if is_four_bits else matrix.values.view(torch.uint8),
        matrix.scales,
        out,
        num_tokens,
        num_outputs,
        num_inputs,
        triton.cdiv(triton.cdiv(num_inputs, config.splits), GROUP_INPUTS) * GROUP_INPUTS,
        x_TI.stride(0),
        matrix.values.stride(0),
        matrix.scales.stride(0),
        out.stride(-2),
        **options,
    )
