"""What training runs of a DeltaNet layer: its inputs cut into heads, and the gated delta rule.

Both work over packed documents, anew at each, and have gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_nn.kernels.causal_conv import causal_conv
from kiln_nn.kernels.checks import check_cu_seqlens, check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu
from kiln_nn.kernels.gated_delta import delta_rule_heads, gated_delta_chunked

__all__ = ["delta_train", "delta_train_heads"]


def delta_train_heads(
    mixed_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    positions_T: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    num_key_heads: int,
    key_dim: int,
    value_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve the rows q|k|v of each document, apply SiLU, and cut them into heads.

    `positions_T` are the tokens' places in their documents, int32: the same fact as `cu_seqlens`.

    Returns: q and k `[T, h, K]` of unit length, q scaled by `K^-0.5`, and v `[T, H, V]`: in the inputs'
    format from the kernels, in float32 (float64 for float64 inputs) otherwise.

    Raises:
        ShapeMismatch: shapes or document boundaries do not fit.
    """
    num_tokens, num_channels = mixed_TC.shape
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    check_shape("weight", weight_CW, (num_channels, None))
    check_shape("positions", positions_T, (num_tokens,))
    if may_train_on_gpu("delta_train_heads", mixed_TC, weight_CW, positions_T):
        from kiln_nn.kernels.delta_train import triton_heads

        if triton_heads.supports(mixed_TC, weight_CW, key_dim, value_dim):
            sizes = (num_key_heads, key_dim, value_dim)
            return triton_heads.train_heads(mixed_TC, weight_CW, positions_T, *sizes)
    convolved, _ = causal_conv(mixed_TC, weight_CW, bounds)
    return delta_rule_heads(convolved, num_key_heads, key_dim, value_dim)


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
    if may_train_on_gpu("delta_train", q_ThK, k_ThK, v_THV, g_TH, beta_TH):
        from kiln_nn.kernels.delta_train import triton

        if triton.supports(q_ThK, k_ThK, v_THV, g_TH, beta_TH):
            return triton.delta_train(q_ThK, k_ThK, v_THV, g_TH, beta_TH, bounds)
    return gated_delta_chunked(q_ThK, k_ThK, v_THV, g_TH, beta_TH, bounds).out_THV
