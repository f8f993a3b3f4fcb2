"""Causal attention over packed documents that bring their whole past with them (training)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_nn.kernels.checks import check_cu_seqlens, check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu
from kiln_nn.kernels.varlen_attention import flash, reference

__all__ = ["ATTENTION_OPERATORS", "varlen_attention"]

# torch's operators behind it, whose results may be kept where all around them is computed again.
ATTENTION_OPERATORS = (
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def varlen_attention(
    q_THD: torch.Tensor,
    k_ThD: torch.Tensor,
    v_ThD: torch.Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Attend from each token to itself and the earlier tokens of its document.

    Returns: `[T, H, D]` in the format of `q_THD`.

    Raises:
        ShapeMismatch: shapes or document boundaries do not fit.
    """
    num_tokens, _, head_dim = q_THD.shape
    check_shape("k", k_ThD, (num_tokens, None, head_dim))
    check_shape("v", v_ThD, tuple(k_ThD.shape))
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    if may_train_on_gpu("varlen_attention", q_THD) and flash.why_not(q_THD, k_ThD, v_ThD) is None:
        return flash.varlen_attention(q_THD, k_ThD, v_ThD, bounds, scale)
    return reference.varlen_attention(q_THD, k_ThD, v_ThD, bounds, scale)
