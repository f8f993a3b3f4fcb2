"""Linear layers of few tokens in Triton: tiles of weights streamed once past tensor cores.

With few tokens a linear layer is the reading of its weights. A program holds a tile of outputs
for all tokens of a tile (16 to 128, padded), streams the weights' rows through a ring of
asynchronous copies and multiplies them on tensor cores, weights as the left operand. Narrow
layers share the inputs of a tile between programs (split-K) and leave partial sums, which the
residual's norm adds up. The gated form computes gate and up of the same outputs in one program.
Programs start before their predecessor ends (dependent_launch.py).

Takes bf16 x and weights of any size, x and weights contiguous in the inputs with any row stride.
Sums are float32 and rounded once to the output's format. Every element is summed in one order,
given by the configuration alone: neither the number of tokens nor the place in it changes a bit.

Measured against float64 on an H200: 1.7e-3 relative in bf16, one rounding; 2e-7 to 5e-6 in
float32, growing with the inputs of a split.

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


@triton.jit
def multiply(w, x, acc, INTERPRETED: tl.constexpr):
    """`acc_OT + w_OI x_IT`; the interpreter's bf16 products are wrong, so it gets float32."""
    if INTERPRETED:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(w, x, acc)


@triton.jit
def _sum_over(
    w_ptrs,
    up_ptrs,
    x_ptrs,
    in_tokens,
    first,
    last,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Products over inputs `first` to `last`: `[OUTPUTS, TOKENS]` of the weights and of the gated form's up."""
    acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    up_acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    cols = tl.arange(0, INPUTS)
    for start in range(first, last, INPUTS):
        if IS_EVEN:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=in_tokens[None, :], other=0.0, eviction_policy="evict_last")
        else:
            in_inputs = start + cols < last
            w = tl.load(w_ptrs + start, mask=in_inputs[None, :], other=0.0)
            x = tl.load(x_ptrs + start, mask=in_inputs[:, None] & in_tokens[None, :], other=0.0)
        acc = multiply(w, x, acc, INTERPRETED)
        if GATED:
            if IS_EVEN:
                up = tl.load(up_ptrs + start, eviction_policy="evict_first")
            else:
                up = tl.load(up_ptrs + start, mask=(start + cols < last)[None, :], other=0.0)
            up_acc = multiply(up, x, up_acc, INTERPRETED)
    return acc, up_acc


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    split_inputs,
    x_stride,
    w_stride,
    out_stride,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FOLDED: tl.constexpr,
    GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SHOWS_PRODUCERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    split = tl.program_id(1)
    outputs = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows past the end read the last one again; their results are not stored.
    rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    row_ptrs = w_ptr + rows * w_stride
    up_ptrs = w_ptr + (rows + num_outputs) * w_stride
    first = split * split_inputs
    last = tl.minimum(first + split_inputs, num_inputs)
    if DEPENDENT:
        if not SHOWS_PRODUCERS:
            start_dependents()
        wait_for_producers()
        if SHOWS_PRODUCERS:
            start_dependents()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    in_tokens = tokens < num_tokens
    cols = tl.arange(0, INPUTS)
    w_ptrs = row_ptrs[:, None] + cols[None, :]
    up_ptrs = up_ptrs[:, None] + cols[None, :]
    x_ptrs = x_ptr + cols[:, None] + tokens[None, :].to(tl.int64) * x_stride
    acc, up_acc = _sum_over(
        w_ptrs, up_ptrs, x_ptrs, in_tokens, first, last, OUTPUTS, TOKENS, INPUTS, GATED, IS_EVEN, INTERPRETED
    )
    if FOLDED:
        # The other partial sums too, added in the order in which the norm adds them.
        for later in range(1, SPLITS):
            first = later * split_inputs
            last = tl.minimum(first + split_inputs, num_inputs)
            part, _ = _sum_over(
                w_ptrs,
                up_ptrs,
                x_ptrs,
                in_tokens,
                first,
                last,
                OUTPUTS,
                TOKENS,
                INPUTS,
                GATED,
                IS_EVEN,
                INTERPRETED,
            )
            acc += part
    if GATED:
        acc = acc * tl.sigmoid(acc) * up_acc
    places = (split.to(tl.int64) * num_tokens + tokens[None, :]) * out_stride + outputs[:, None]
    mask = in_tokens[None, :] & (outputs < num_outputs)[:, None]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


def takes(x_TI: torch.Tensor, w_OI: torch.Tensor) -> bool:
    """Whether the kernel computes these formats and strides."""
    return (
        x_TI.dtype is torch.bfloat16
        and w_OI.dtype is torch.bfloat16
        and x_TI.numel() > 0
        and w_OI.numel() > 0
        and x_TI.stride(1) == 1
        and w_OI.stride(1) == 1
    )


def launch(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    is_gated: bool = False,
    is_folded: bool = False,
    is_dependent: bool | None = None,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` where sums are not folded.

    The rows of `out` may lie apart, where it has two dimensions. `is_dependent=None` uses dependent launches where the device has them; `shows_producers` as in
    triton_hopper.py.
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs = w_OI.shape[0] // 2 if is_gated else w_OI.shape[0]
    splits = 1 if is_gated else config.splits
    is_folded = is_folded and splits > 1
    split_inputs = triton.cdiv(triton.cdiv(num_inputs, splits), config.inputs) * config.inputs
    # An empty split would leave its partial sum at zero: correct, and never worth a configuration.
    is_even = num_inputs % config.inputs == 0
    if is_dependent is None:
        is_dependent = supports_dependent_launch(x_TI.device)
    options: dict[str, Any] = {
        "OUTPUTS": config.outputs,
        "TOKENS": config.tokens,
        "INPUTS": config.inputs,
        "SPLITS": splits if is_folded else 1,
        "FOLDED": is_folded,
        "GATED": is_gated,
        "IS_EVEN": is_even,
        "SHOWS_PRODUCERS": shows_producers,
        "INTERPRETED": is_interpreted(),
        "num_warps": config.warps,
        "num_stages": config.stages,
        **launch_options(is_dependent),
    }
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        1 if is_folded else splits,
        triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        x_TI,
        w_OI,
        out,
        num_tokens,
        num_outputs,
        num_inputs,
        split_inputs,
        x_TI.stride(0),
        w_OI.stride(0),
        out.stride(-2),
        **options,
    )
