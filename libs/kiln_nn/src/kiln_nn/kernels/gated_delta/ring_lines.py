"""Several tokens of each row at once against its state and its ring: what `gated_delta_ring_step` does one by one.

With the state and the ring every token has a prediction of its own; what the tokens before it in the same
call have corrected is then one small triangular system for each row and head.

Legend: as in `ring.py`; `N` tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kiln_nn.kernels.checks import accumulation_dtype
from kiln_nn.kernels.gated_delta.ring import DeltaRing


class RingLines(NamedTuple):
    """The tokens' outputs and, beside their keys, what the ring keeps of them."""

    out_RNHV: torch.Tensor
    u_RHNV: torch.Tensor
    log_decay_RHN: torch.Tensor


def gated_delta_ring_lines(
    state_RHKV: torch.Tensor,
    ring: DeltaRing,
    mask_R1P: torch.Tensor,
    q_RNhK: torch.Tensor,
    k_RNhK: torch.Tensor,
    v_RNHV: torch.Tensor,
    g_RNH: torch.Tensor,
    beta_RNH: torch.Tensor,
) -> RingLines:
    """Advance every row by N tokens without touching its state; the mask is that before the first.

    No token depends on a later one. Returns: float32 (float64 for float64 states).
    """
    dtype = accumulation_dtype(state_RHKV, g_RNH)
    num_tokens = k_RNhK.shape[1]
    group = state_RHKV.shape[1] // k_RNhK.shape[2]
    k, q = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k_RNhK, q_RNhK))
    v, beta = v_RNHV.transpose(1, 2), beta_RNH.transpose(1, 2)[..., None]
    ring_decay = (ring.log_decay_RHP.to(dtype) + mask_R1P)[:, :, None]
    # Decays only fall, so the ring's last is its smallest; an empty ring has none below 0.
    begun = ring_decay.amin(-1).clamp(max=0.0)
    log_decay = g_RNH.transpose(1, 2).cumsum(-1) + begun

    pairs = torch.cat((k, q), dim=2)
    ring_keys = ring.k_RhPK.to(dtype).repeat_interleave(group, dim=1)
    ring_weights = (pairs @ ring_keys.mT) * (log_decay[..., None] - ring_decay).exp().repeat(1, 1, 2, 1)
    both = ring_weights @ ring.u_RHPV.to(dtype)
    both += (pairs * log_decay.exp().repeat(1, 1, 2)[..., None]) @ state_RHKV.to(dtype)
    predicted, read = both.chunk(2, dim=2)

    earlier = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=k.device).tril()
    between = log_decay[..., None] - log_decay[:, :, None]
    decay = between.masked_fill(~earlier, -torch.inf).exp()
    of_keys, of_queries = (pairs @ k.mT).chunk(2, dim=2)
    # The diagonal is taken for ones.
    system = beta * of_keys * decay
    u = torch.linalg.solve_triangular(system, beta * (v - predicted), upper=False, unitriangular=True)
    out = read + (of_queries * decay) @ u
    return RingLines(out.transpose(1, 2), u, log_decay)
