"""Convolution, SiLU and L2 norms of packed rows q|k|v, into heads, with their backward pass.

A program slides over RUN tokens of a few heads and keeps the convolution's window in registers, so
that every row is read about once. Backward computes the convolution again and runs three tokens
further: a token's input takes part in the three outputs after it.

Supported: float32 and bfloat16, K and V powers of two, convolution width 2 to 4, frozen weights.
Arithmetic is float32. Error against float64 under the interpreter: below 1e-6.

Legend: `T` tokens, `C` channels (q|k|v side by side), `h`/`H` key and value heads, `K`/`V` their width,
`W` convolution width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.delta_prefill.triton_conv import conv_tap

_RUN_TOKENS = 16
_HEADS_PER_PROGRAM = 4
_FORMATS = (torch.float32, torch.bfloat16)


@triton.jit
def _row(mixed, mixed_stride, channels, row, num_tokens):
    is_row = (channels >= 0) & (row >= 0) & (row < num_tokens)
    return tl.load(mixed + row.to(tl.int64) * mixed_stride + channels, mask=is_row, other=0.0).to(tl.float32)


@triton.jit
def _since(x, position, distance: tl.constexpr):
    """A row `distance` tokens before, or zeros where the document began after it."""
    return tl.where(position >= distance, x, 0.0)


@triton.jit
def _heads_forward(
    mixed, positions, conv_weight, channels, first_row, num_tokens, mixed_stride, scale,
    targets, target_stride, W: tl.constexpr, RUN: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    w0, w1 = conv_tap(conv_weight, channels, 0, W), conv_tap(conv_weight, channels, 1, W)
    w2, w3 = conv_tap(conv_weight, channels, 2, W), conv_tap(conv_weight, channels, 3, W)
    x3 = _row(mixed, mixed_stride, channels, first_row - 3, num_tokens)
    x2 = _row(mixed, mixed_stride, channels, first_row - 2, num_tokens)
    x1 = _row(mixed, mixed_stride, channels, first_row - 1, num_tokens)
    for step in tl.static_range(RUN):
        row = first_row + step
        x0 = _row(mixed, mixed_stride, channels, row, num_tokens)
        position = tl.load(positions + row, mask=row < num_tokens, other=0)
        c = (
            w3 * x0
            + w2 * _since(x1, position, 1)
            + w1 * _since(x2, position, 2)
            + w0 * _since(x3, position, 3)
        )
        y = c / (1.0 + tl.exp(-c))
        if NORMALISES:
            y *= (scale * tl.rsqrt(tl.sum(y * y, 1) + 1e-6))[:, None]
        is_stored = (channels >= 0) & (row < num_tokens)
        tl.store(targets + row.to(tl.int64) * target_stride, y.to(targets.dtype.element_ty), mask=is_stored)
        x3 = x2
        x2 = x1
        x1 = x0


@triton.jit
def _heads_backward(
    mixed, positions, conv_weight, channels, first_row, num_tokens, mixed_stride, scale,
    grads, grad_stride, mixed_grad, C: tl.constexpr,
    W: tl.constexpr, RUN: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    w0, w1 = conv_tap(conv_weight, channels, 0, W), conv_tap(conv_weight, channels, 1, W)
    w2, w3 = conv_tap(conv_weight, channels, 2, W), conv_tap(conv_weight, channels, 3, W)
    x3 = _row(mixed, mixed_stride, channels, first_row - 3, num_tokens)
    x2 = _row(mixed, mixed_stride, channels, first_row - 2, num_tokens)
    x1 = _row(mixed, mixed_stride, channels, first_row - 1, num_tokens)
    grad3, grad2, grad1 = tl.zeros_like(x3), tl.zeros_like(x3), tl.zeros_like(x3)
    for step in tl.static_range(RUN + 3):
        row = first_row + step
        is_row = (channels >= 0) & (row < num_tokens)
        x0 = _row(mixed, mixed_stride, channels, row, num_tokens)
        position = tl.load(positions + row, mask=row < num_tokens, other=0)
        c = (
            w3 * x0
            + w2 * _since(x1, position, 1)
            + w1 * _since(x2, position, 2)
            + w0 * _since(x3, position, 3)
        )
        share = 1.0 / (1.0 + tl.exp(-c))
        grad = tl.load(grads + row.to(tl.int64) * grad_stride, mask=is_row, other=0.0).to(tl.float32)
        if NORMALISES:
            y = c * share
            inverse = tl.rsqrt(tl.sum(y * y, 1) + 1e-6)
            along = tl.sum(y * grad, 1) * inverse * inverse
            grad = (grad - y * along[:, None]) * (scale * inverse)[:, None]
        grad *= share * (1.0 + c * (1.0 - share))
        grad3 += _since(w0 * grad, position, 3)
        grad2 += _since(w1 * grad, position, 2)
        grad1 += _since(w2 * grad, position, 1)
        if step >= 3:
            places = mixed_grad + (row - 3).to(tl.int64) * C + channels
            is_stored = (channels >= 0) & (row - 3 < num_tokens)
            tl.store(places, grad3.to(mixed_grad.dtype.element_ty), mask=is_stored)
        grad3 = grad2
        grad2 = grad1
        grad1 = w3 * grad
        x3 = x2
        x2 = x1
        x1 = x0


@triton.jit(do_not_specialize=["num_tokens"])
def heads_kernel(
    mixed, positions, conv_weight, q, k, v, num_tokens, mixed_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, HEADS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Grid (T / RUN, (2 HK + H) / HEADS): HEADS heads of q, k or v, RUN tokens."""
    first_row = tl.program_id(0) * RUN
    first_head = tl.program_id(1) * HEADS
    head = tl.arange(0, HEADS)[:, None]
    if first_head < 2 * HK:
        key = tl.arange(0, K)[None, :]
        is_k = first_head >= HK
        targets = (k if is_k else q) + (first_head % HK + head) * K + key
        _heads_forward(
            mixed, positions, conv_weight, (first_head + head) * K + key, first_row, num_tokens, mixed_stride,
            tl.where(is_k, 1.0, K**-0.5), targets, HK * K, W, RUN, True,
        )  # fmt: skip
    else:
        value = (first_head - 2 * HK + head) * V + tl.arange(0, V)[None, :]
        _heads_forward(
            mixed, positions, conv_weight, 2 * HK * K + value, first_row, num_tokens, mixed_stride,
            1.0, v + value, H * V, W, RUN, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def heads_grads_kernel(
    mixed, positions, conv_weight, q_grad, k_grad, v_grad, mixed_grad, num_tokens, mixed_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, HEADS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Grid as above."""
    C: tl.constexpr = 2 * HK * K + H * V
    first_row = tl.program_id(0) * RUN
    first_head = tl.program_id(1) * HEADS
    head = tl.arange(0, HEADS)[:, None]
    if first_head < 2 * HK:
        key = tl.arange(0, K)[None, :]
        is_k = first_head >= HK
        grads = (k_grad if is_k else q_grad) + (first_head % HK + head) * K + key
        _heads_backward(
            mixed, positions, conv_weight, (first_head + head) * K + key, first_row, num_tokens, mixed_stride,
            tl.where(is_k, 1.0, K**-0.5), grads, HK * K, mixed_grad, C, W, RUN, True,
        )  # fmt: skip
    else:
        value = (first_head - 2 * HK + head) * V + tl.arange(0, V)[None, :]
        _heads_backward(
            mixed, positions, conv_weight, 2 * HK * K + value, first_row, num_tokens, mixed_stride,
            1.0, v_grad + value, H * V, mixed_grad, C, W, RUN, False,
        )  # fmt: skip


def supports(mixed_TC: torch.Tensor, weight_CW: torch.Tensor, key_dim: int, value_dim: int) -> bool:
    """Whether shapes and formats are within what the kernels were written for."""
    return (
        not weight_CW.requires_grad
        and weight_CW.is_contiguous()
        and 2 <= weight_CW.shape[1] <= 4
        and mixed_TC.shape[0] > 0
        and mixed_TC.stride(1) == 1
        and all(width & (width - 1) == 0 for width in (key_dim, value_dim))
        and all(x.dtype in _FORMATS for x in (mixed_TC, weight_CW))
    )


def _launch(
    mixed: torch.Tensor, weight: torch.Tensor, num_key_heads: int, key_dim: int, value_dim: int
) -> tuple[tuple[int, int], dict[str, int]]:
    num_heads = (mixed.shape[1] - 2 * num_key_heads * key_dim) // value_dim
    common_heads = math.gcd(num_heads, num_key_heads)
    heads_per_program = min(_HEADS_PER_PROGRAM, common_heads & -common_heads)
    grid = (triton.cdiv(mixed.shape[0], _RUN_TOKENS), (2 * num_key_heads + num_heads) // heads_per_program)
    sizes = {"H": num_heads, "HK": num_key_heads, "K": key_dim, "V": value_dim}
    return grid, sizes | {
        "W": weight.shape[1],
        "HEADS": heads_per_program,
        "RUN": _RUN_TOKENS,
        "num_warps": 4,
        "num_stages": 1,
    }


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        positions: torch.Tensor,
        weight: torch.Tensor,
        num_key_heads: int,
        key_dim: int,
        value_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = mixed.shape[0]
        grid, options = _launch(mixed, weight, num_key_heads, key_dim, value_dim)
        q = mixed.new_empty(num_tokens, num_key_heads, key_dim)
        k, v = torch.empty_like(q), mixed.new_empty(num_tokens, options["H"], value_dim)
        heads_kernel[grid](mixed, positions, weight, q, k, v, num_tokens, mixed.stride(0), **options)
        ctx.save_for_backward(mixed, positions, weight)
        ctx.launch = grid, options
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixed, positions, weight = ctx.saved_tensors
        grid, options = ctx.launch
        mixed_grad = mixed.new_empty(mixed.shape)
        of_heads = (grad.contiguous() for grad in grads)
        heads_grads_kernel[grid](
            mixed, positions, weight, *of_heads, mixed_grad, mixed.shape[0], mixed.stride(0), **options
        )
        return mixed_grad, None, None, None, None, None


def train_heads(
    mixed_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    positions_T: torch.Tensor,
    num_key_heads: int,
    key_dim: int,
    value_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the package's `delta_train_heads`, for inputs that `supports` accepts; `positions_T` in int32."""
    return _Heads.apply(mixed_TC, positions_T, weight_CW, num_key_heads, key_dim, value_dim)  # type: ignore[no-any-return]
