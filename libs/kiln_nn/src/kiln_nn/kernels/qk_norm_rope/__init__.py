"""The norm and rotary embedding of queries or keys, with a gradient: what training runs."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu
from kiln_nn.kernels.qk_norm_rope import reference

__all__ = ["qk_norm_rope"]


def qk_norm_rope(
    x_THD: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TE: torch.Tensor, sin_TE: torch.Tensor
) -> torch.Tensor:
    """Norm every head, multiply by `1 + weight`, then rotate the first E of its components.

    `cos_TE`, `sin_TE` come from `rotary_tables`.

    Returns: the shape and format of `x_THD`.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    num_tokens, _, head_dim = x_THD.shape
    check_shape("weight", weight_D, (head_dim,))
    check_shape("cos", cos_TE, (num_tokens, None))
    check_shape("sin", sin_TE, tuple(cos_TE.shape))
    if may_train_on_gpu("qk_norm_rope", x_THD, weight_D, cos_TE, sin_TE):
        from kiln_nn.kernels.qk_norm_rope import triton

        if triton.supports(x_THD, weight_D, cos_TE, sin_TE):
            return triton.qk_norm_rope(x_THD, weight_D, eps, cos_TE, sin_TE)
    return reference.qk_norm_rope(x_THD, weight_D, eps, cos_TE, sin_TE)
