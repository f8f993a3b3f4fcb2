"""The gated delta rule one token at a time: the definition the other forms are checked against.

Legend: `T` tokens, `N` documents, `H` value heads, `h` key heads (each serves H/h
consecutive value heads), `K`/`V` key and value width.

Paper: Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks (arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from kiln_nn.kernels.checks import accumulation_dtype, check_cu_seqlens


def gated_delta_recurrent(
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_THV: torch.Tensor,
    g_TH: torch.Tensor,
    beta_TH: torch.Tensor,
    cu_seqlens: Sequence[int],
    initial_states_NHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `S <- e^g S; S <- S + k (beta (v - S^T k))^T; o = S^T q` over each document.

    Returns: outputs `[T, H, V]` and the states after each document's last token
    `[N, H, K, V]`, both in float32 (float64 for float64 inputs).
    """
    dtype = accumulation_dtype(v_THV, g_TH)
    num_heads, group = v_THV.shape[1], v_THV.shape[1] // k_ThK.shape[1]
    q, k = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q_ThK, k_ThK))
    v, decay, beta = v_THV.to(dtype), g_TH.to(dtype).exp(), beta_TH.to(dtype)
    outputs, states = [], []
    bounds = check_cu_seqlens(cu_seqlens, v.shape[0])
    for doc, (start, end) in enumerate(pairwise(bounds)):
        state = v.new_zeros(num_heads, k.shape[-1], v.shape[-1])
        if initial_states_NHKV is not None:
            state = initial_states_NHKV[doc].to(dtype)
        for t in range(start, end):
            state = state * decay[t, :, None, None]
            predicted = torch.einsum("hkv,hk->hv", state, k[t])
            corrected = beta[t, :, None] * (v[t] - predicted)
            state = state + k[t, :, :, None] * corrected[:, None, :]
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        states.append(state)
    out = torch.stack(outputs) if outputs else v.new_zeros(v.shape)
    return out, torch.stack(states)
