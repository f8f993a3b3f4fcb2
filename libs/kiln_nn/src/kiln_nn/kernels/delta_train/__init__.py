"""The gated delta rule over packed documents with gradients of all its inputs: what training runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_nn.kernels.checks import check_cu_seqlens, check_shape
from kiln_nn.kernels.dispatch import may_train_on_triton
from kiln_nn.kernels.gated_delta import gated_delta_chunked

__all__ = ["delta_train"]


def delta_train(
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_THV: torch.Tensor,
    g_TH: torch.Tensor,
    beta_TH: torch.Tensor,
    cu_seqlens: Sequence[int],
) -> torch.Tensor:
    """Run the gated delta rule over each document from a state of zeros.

    Inputs as in `gated_delta`: `q` and `k` L2-normalised, `q` scaled, log-decays `g` and write
    strengths `beta` in float32.

    Returns: outputs `[T, H, V]`, in the format of `v` from the kernels and in float32 (float64 for
    float64 inputs) otherwise. Differentiable in all five.

    Raises:
        ShapeMismatch: shapes or document boundaries do not fit.
    """
    num_tokens, num_heads, _ = v_THV.shape
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    check_shape("q", q_ThK, tuple(k_ThK.shape))
    check_shape("k", k_ThK, (num_tokens, None, None))
    check_shape("g", g_TH, (num_tokens, num_heads))
    check_shape("beta", beta_TH, (num_tokens, num_heads))
    if may_train_on_triton(q_ThK, k_ThK, v_THV, g_TH, beta_TH):
        from kiln_nn.kernels.delta_train import triton

        if triton.supports(q_ThK, k_ThK, v_THV, g_TH, beta_TH):
            return triton.delta_train(q_ThK, k_ThK, v_THV, g_TH, beta_TH, bounds)
    return gated_delta_chunked(q_ThK, k_ThK, v_THV, g_TH, beta_TH, bounds).out_THV
