"""Query or key norm and rotary embedding with their backward pass, in Triton; the weight is frozen.

A rotated component reads its partner, half the rotated width away, a second time instead of exchanging
it inside the program. Supported: float32, bf16 and fp16, any head width whose last dimension is
contiguous, float32 tables. Arithmetic is float32 and rounds once; error against float64 under the
interpreter: below 1e-6 in float32.

Legend: `T` tokens, `H` heads, `D` head width, `E` rotated width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ELEMENTS_PER_PROGRAM = 2048
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _rotation(cos, sin, token, column, mask, E: tl.constexpr):
    """Cosine and signed sine of each component (1 and 0 behind E), and its partner's column."""
    is_turned = mask & (column < E)[None, :]
    c = tl.load(cos + token[:, None] * E + column[None, :], mask=is_turned, other=1.0)
    s = tl.load(sin + token[:, None] * E + column[None, :], mask=is_turned, other=0.0)
    is_first = column < E // 2
    partner = tl.where(is_first, column + E // 2, tl.where(column < E, column - E // 2, column))
    return c, tl.where(is_first[None, :], -s, s), partner


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, weight_ptr, cos, sin, out_ptr, num_rows, token_stride, head_stride, eps,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    token = row // H
    c, s, partner = _rotation(cos, sin, token, column, mask, E)
    places = x_ptr + (token * token_stride + row % H * head_stride)[:, None]
    x = tl.load(places + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(places + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = 1.0 + tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    other_weight = 1.0 + tl.load(weight_ptr + partner, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    out = (x * weight[None, :] * c + other * other_weight[None, :] * s) * inverse[:, None]
    tl.store(out_ptr + row[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x_ptr, weight_ptr, cos, sin, grad_ptr, out_ptr, num_rows, token_stride, head_stride, eps,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    token = row // H
    c, s, partner = _rotation(cos, sin, token, column, mask, E)
    grads = grad_ptr + row[:, None] * D
    grad = tl.load(grads + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(grads + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = 1.0 + tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    # Turning back: the same angle with the opposite sign. Both halves of a pair have one angle.
    grad = (grad * c - other * s) * weight[None, :]
    places = x_ptr + (token * token_stride + row % H * head_stride)[:, None]
    x = tl.load(places + column[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    along = tl.sum(grad * x, 1) / D * inverse * inverse
    out = (grad - x * along[:, None]) * inverse[:, None]
    tl.store(out_ptr + row[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def supports(x_THD: torch.Tensor, weight_D: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> bool:
    """Whether formats and strides are within what the kernels were written for."""
    return (
        not weight_D.requires_grad
        and x_THD.shape[0] > 0
        and x_THD.stride(2) == 1
        and x_THD.dtype in _FORMATS
        and weight_D.dtype in _FORMATS
        and all(table.dtype is torch.float32 and table.is_contiguous() for table in (cos_TE, sin_TE))
    )


def _launch(x_THD: torch.Tensor, rotary_dim: int) -> tuple[tuple[int], dict[str, int]]:
    num_tokens, num_heads, head_dim = x_THD.shape
    block = triton.next_power_of_2(head_dim)
    rows = max(1, _ELEMENTS_PER_PROGRAM // block)
    sizes = {"H": num_heads, "D": head_dim, "E": rotary_dim, "BLOCK_D": block, "ROWS": rows}
    return (triton.cdiv(num_tokens * num_heads, rows),), sizes | {"num_warps": 8}


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        out = x.new_empty(x.shape)
        grid, options = _launch(x, cos.shape[1])
        num_rows = x.shape[0] * x.shape[1]
        _forward_kernel[grid](x, weight, cos, sin, out, num_rows, x.stride(0), x.stride(1), eps, **options)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        out = x.new_empty(x.shape)
        grid, options = _launch(x, cos.shape[1])
        num_rows = x.shape[0] * x.shape[1]
        strides = (x.stride(0), x.stride(1))
        _backward_kernel[grid](
            x, weight, cos, sin, grads[0].contiguous(), out, num_rows, *strides, ctx.eps, **options
        )
        return out, None, None, None, None


def qk_norm_rope(
    x_THD: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TE: torch.Tensor, sin_TE: torch.Tensor
) -> torch.Tensor:
    """As the package's public function, for inputs that `supports` accepts."""
    return _QkNormRope.apply(x_THD, weight_D, eps, cos_TE, sin_TE)  # type: ignore[no-any-return]
