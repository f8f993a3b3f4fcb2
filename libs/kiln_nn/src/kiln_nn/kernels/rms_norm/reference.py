"""Root-mean-square norms in plain torch.

`D` is the normalised width; leading dimensions are free.

Paper: Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype, check_shape


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float) -> torch.Tensor:
    """Normalise the last dimension and multiply by `offset + weight`.

    Qwen3.5 stores its layer, query, key and final norms as the difference from
    one, so they pass `offset=1`.

    Returns: the shape and format of `x_D`.
    """
    check_shape("weight", weight_D, (x_D.shape[-1],))
    dtype = accumulation_dtype(x_D)
    normalised = F.rms_norm(x_D.to(dtype), weight_D.shape, eps=eps)
    if offset == 1.0:
        scaled = torch.addcmul(normalised, normalised, weight_D.to(dtype))
    else:
        scaled = normalised * (offset + weight_D.to(dtype))
    return scaled.to(x_D.dtype)


def add_rms_norm(
    x_D: torch.Tensor, residual_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual stream and normalise the sum as `rms_norm` does.

    `x_D` may have one more dimension in front: partial sums, added in their order in float32.

    Returns: the normed sum and the sum itself, both in the format of `residual_D`.
    """
    if x_D.dim() > residual_D.dim():
        first, *others = x_D.to(accumulation_dtype(x_D))
        x_D = sum(others, start=first)
    total = (residual_D + x_D).to(residual_D.dtype)
    return rms_norm(total, weight_D, eps, offset=offset), total


def gated_rms_norm(x_D: torch.Tensor, z_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x`, multiply by `weight`, then gate with `silu(z)`: the norm comes first.

    Returns: the shape of `x_D` in the format of `z_D` (the DeltaNet's output is
    kept in float32 until here).
    """
    check_shape("weight", weight_D, (x_D.shape[-1],))
    dtype = accumulation_dtype(x_D)
    normalised = F.rms_norm(x_D.to(dtype), weight_D.shape, weight_D.to(dtype), eps)
    return (normalised * F.silu(z_D.to(dtype))).to(z_D.dtype)


def l2_normalise(x_D: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scale the last dimension to unit length; `eps` is added to the squared length."""
    inverse_length = torch.rsqrt((x_D * x_D).sum(dim=-1, keepdim=True) + eps)
    return x_D * inverse_length
