"""Causal softmax attention inside each packed document, in plain torch.

Legend: `T` tokens, `H` query heads, `h` kv heads (each serves H/h consecutive query
heads), `D` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import check_cu_seqlens, check_shape


def varlen_attention(
    q_THD: torch.Tensor,
    k_ThD: torch.Tensor,
    v_ThD: torch.Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Attend from each token to itself and the earlier tokens of its document.

    Returns: `[T, H, D]` in the format of `q_THD`. One call of torch's fused attention per
    document, so no scores of one document against another are ever computed.
    """
    num_tokens, _, head_dim = q_THD.shape
    check_shape("k", k_ThD, (num_tokens, None, head_dim))
    check_shape("v", v_ThD, tuple(k_ThD.shape))
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    outputs = []
    for start, end in pairwise(bounds):
        if start == end:
            continue
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_THD, k_ThD, v_ThD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros_like(q_THD)
