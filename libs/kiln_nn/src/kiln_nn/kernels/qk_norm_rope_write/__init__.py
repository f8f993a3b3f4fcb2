"""What stands between an attention layer's projections and its attention, in one launch."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.qk_norm_rope_write import reference

__all__ = ["qk_norm_rope_write"]


def qk_norm_rope_write(
    q_THD: torch.Tensor,
    k_ThD: torch.Tensor,
    v_ThD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    positions_T: torch.Tensor,
    inverse_frequencies_F: torch.Tensor,
    token_slots_T: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
) -> torch.Tensor:
    """Norm queries and keys (by 1 + weight), rotate both, and store keys and values in their pages.

    `q_THD` may be the query half of [query | gate] as `q_proj` makes it, in rows of a larger
    projection; the gate then needs no copy of its own. Angles are `positions * inverse_frequencies`
    in float32 (`rotary.inverse_frequencies`). What an fp8 cache cannot hold is cut to its range. A token's slot is `page_id * S + place in the page`, or negative for a
    padding token, whose key and value go nowhere. No two tokens share a slot.

    Returns: the queries, `[T, H, D]`, contiguous on a GPU, in the format of `q_THD`.
    """
    num_tokens, _, head_dim = q_THD.shape
    num_kv_heads = k_ThD.shape[1]
    check_shape("k", k_ThD, (num_tokens, None, head_dim))
    check_shape("v", v_ThD, tuple(k_ThD.shape))
    check_shape("q_norm", q_weight_D, (head_dim,))
    check_shape("k_norm", k_weight_D, (head_dim,))
    check_shape("positions", positions_T, (num_tokens,))
    check_shape("inverse_frequencies", inverse_frequencies_F, (None,))
    check_shape("token_slots", token_slots_T, (num_tokens,))
    check_shape("k_cache", k_cache_PShD, (None, None, num_kv_heads, head_dim))
    check_shape("v_cache", v_cache_PShD, tuple(k_cache_PShD.shape))
    tensors = (q_THD, k_ThD, v_ThD, q_weight_D, k_weight_D, positions_T, inverse_frequencies_F)
    implementation = reference.qk_norm_rope_write
    written = (token_slots_T, k_cache_PShD, v_cache_PShD)
    if takes_triton(*tensors, *written):
        from kiln_nn.kernels.qk_norm_rope_write import triton

        if triton.takes(*tensors, *written):
            implementation = triton.qk_norm_rope_write
    return implementation(*tensors[:5], eps, *tensors[5:], *written)
