"""Query and key norms, rotary embedding and the write into KV pages, in plain torch.

Legend: `T` tokens, `H` query heads, `h` kv heads, `D` head width, `E` rotated width, `F` rotated
pairs, `P` pages of `S` tokens.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.paged_attention import write_kv
from kiln_nn.kernels.rms_norm.reference import rms_norm
from kiln_nn.kernels.rotary import apply_rotary, cos_and_sin


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
    """Norm and rotate queries and keys; store keys and values; return the queries."""
    cos_TE, sin_TE = cos_and_sin(positions_T, inverse_frequencies_F)
    q = apply_rotary(rms_norm(q_THD, q_weight_D, eps, offset=1.0), cos_TE, sin_TE)
    k = apply_rotary(rms_norm(k_ThD, k_weight_D, eps, offset=1.0), cos_TE, sin_TE)
    is_stored = token_slots_T >= 0
    write_kv(k_cache_PShD, token_slots_T[is_stored], k[is_stored])
    write_kv(v_cache_PShD, token_slots_T[is_stored], v_ThD[is_stored])
    return q
