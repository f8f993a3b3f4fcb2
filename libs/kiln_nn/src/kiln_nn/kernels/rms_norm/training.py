"""The norms with gradients of their inputs, in Triton; their weights are frozen.

Takes what `triton.takes` does. Backward reads the inputs again instead of keeping anything else.
Arithmetic is float32; error against float64 under the interpreter: below 1e-6 in float32.

With `n = 1 / rms(x)` and `t = dy (offset + w)`:  dx = n (t - x n^2 mean(t x)).

Legend: `N` rows, `D` normalised width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.rms_norm import triton as forward

_ELEMENTS_PER_PROGRAM = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _norm_grads_kernel(
    x_ptr, weight_ptr, grad_ptr, sum_grad_ptr, out_ptr, num_rows, x_stride, eps, offset,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_SUM_GRAD: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_width = cols < WIDTH
    mask = (rows[:, None] < num_rows) & in_width[None, :]
    places = rows[:, None] * WIDTH + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32) * (offset + weight)[None, :]
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    along = tl.sum(grad * x, axis=1) / WIDTH * inverse * inverse
    out = (grad - x * along[:, None]) * inverse[:, None]
    if HAS_SUM_GRAD:
        out += tl.load(sum_grad_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_norm_grads_kernel(
    x_ptr, z_ptr, weight_ptr, grad_ptr, x_grad_ptr, z_grad_ptr, num_rows, x_stride, z_stride, eps,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_width = cols < WIDTH
    mask = (rows[:, None] < num_rows) & in_width[None, :]
    places = rows[:, None] * WIDTH + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + rows[:, None] * z_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None]
    share = tl.sigmoid(z)
    z_grad = grad * x * inverse * share * (1.0 + z * (1.0 - share))
    tl.store(z_grad_ptr + places, z_grad.to(z_grad_ptr.dtype.element_ty), mask=mask)
    grad *= z * share
    along = (tl.sum(grad * x, axis=1) / WIDTH)[:, None] * inverse * inverse
    x_grad = (grad - x * along) * inverse
    tl.store(x_grad_ptr + places, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)


def _tiling(x_ND: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    num_rows, width = x_ND.shape
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS_PER_PROGRAM // block)
    warps = max(1, min(8, rows * block // 256))
    return (triton.cdiv(num_rows, rows),), {
        "WIDTH": width,
        "BLOCK_D": block,
        "ROWS": rows,
        "num_warps": warps,
    }


def _rows(x_D: torch.Tensor) -> torch.Tensor:
    rows = forward.as_rows(x_D)
    return x_D.reshape(-1, x_D.shape[-1]).contiguous() if rows is None else rows


def _norm_grads(
    x_D: torch.Tensor,
    weight_D: torch.Tensor,
    grad_D: torch.Tensor,
    sum_grad_D: torch.Tensor | None,
    eps: float,
    offset: float,
) -> torch.Tensor:
    x, out = _rows(x_D), x_D.new_empty(x_D.shape)
    grid, tiling = _tiling(x)
    grad = grad_D.contiguous()
    sum_grad = grad if sum_grad_D is None else sum_grad_D.contiguous()
    _norm_grads_kernel[grid](
        x, weight_D, grad, sum_grad, out, x.shape[0], x.stride(0), eps, offset,
        HAS_SUM_GRAD=sum_grad_D is not None, **tiling,
    )  # fmt: skip
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return forward.rms_norm(x, weight, eps, offset=offset)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _norm_grads(x, weight, grads[0], None, ctx.eps, ctx.offset), None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = forward.add_rms_norm(x, residual, weight, eps, offset=offset)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.offset = eps, offset
        return out, total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad = _norm_grads(total, weight, grads[0], grads[1], ctx.eps, ctx.offset)
        return grad, grad, None, None, None


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.eps = eps
        return forward.gated_rms_norm(x, z, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_D, z_D, weight = ctx.saved_tensors
        x, z = _rows(x_D), _rows(z_D)
        x_grad, z_grad = x_D.new_empty(x_D.shape), z_D.new_empty(z_D.shape)
        grid, tiling = _tiling(x)
        _gated_norm_grads_kernel[grid](
            x, z, weight, grads[0].contiguous(), x_grad, z_grad, x.shape[0], x.stride(0), z.stride(0), ctx.eps,
            **tiling,
        )  # fmt: skip
        return x_grad, z_grad, None, None


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float) -> torch.Tensor:
    """As the reference, with a gradient of `x_D`."""
    return _RmsNorm.apply(x_D, weight_D, eps, offset)  # type: ignore[no-any-return]


def add_rms_norm(
    x_D: torch.Tensor, residual_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, with one gradient for `x_D` and `residual_D`, which are of one shape and format."""
    return _AddRmsNorm.apply(x_D, residual_D, weight_D, eps, offset)  # type: ignore[no-any-return]


def gated_rms_norm(x_D: torch.Tensor, z_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference, with gradients of `x_D` and `z_D`."""
    return _GatedRmsNorm.apply(x_D, z_D, weight_D, eps)  # type: ignore[no-any-return]
