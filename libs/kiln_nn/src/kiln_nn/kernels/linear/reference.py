"""Linear layers in plain torch.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.swiglu import swiglu


def linear(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x Wᵀ`; on a GPU a wider `out_dtype` is what the sums are rounded to, not a later conversion."""
    is_widened = out_dtype is not None and out_dtype != x_TI.dtype
    needs_gradient = torch.is_grad_enabled() and (x_TI.requires_grad or w_OI.requires_grad)
    if is_widened and x_TI.is_cuda and out_dtype is torch.float32 and not needs_gradient:
        return torch.mm(x_TI, w_OI.t(), out_dtype=out_dtype, out=out)
    if out is not None and x_TI.is_cuda and out.dtype is x_TI.dtype and not needs_gradient:
        return torch.mm(x_TI, w_OI.t(), out=out)
    y_TO = F.linear(x_TI, w_OI)
    if out is not None:
        return out.copy_(y_TO)
    return y_TO.to(out_dtype) if is_widened else y_TO


def linear_swiglu(x_TI: torch.Tensor, gate_up_OI: torch.Tensor) -> torch.Tensor:
    """`silu(x Wgᵀ) · (x Wuᵀ)` where the rows of Wg come first."""
    gate_TF, up_TF = F.linear(x_TI, gate_up_OI).chunk(2, dim=-1)
    return swiglu(gate_TF, up_TF)


def linear_partials(x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    """`x Wᵀ` as one partial sum, in the format of `x`."""
    return F.linear(x_TI, w_OI)[None]
