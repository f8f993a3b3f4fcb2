"""The gated delta rule for decoding, with a state that is written once per page.

A row's state `S` stands at its last page boundary. For each token since, a ring keeps the
key `k`, the corrected value `u` and the cumulative log-decay `G` since the boundary, the
token's own decay included. A step reads S once:

    pred = e^(G_t) S^T k_t + sum_(i<t) e^(G_t - G_i) (k_i . k_t) u_i
    u_t  = beta_t (v_t - pred)
    o_t  = e^(G_t) S^T q_t + sum_(i<t) e^(G_t - G_i) (k_i . q_t) u_i + (k_t . q_t) u_t

and only the step that fills the page writes it: `S <- e^(G_t) S + sum_(i<=t) e^(G_t - G_i)
k_i u_i^T`. A rejected speculative token is a shorter ring.

Legend: `R` rows, `P` ring capacity (page tokens plus the largest draft), `H` value heads,
`h` key heads, `K`/`V` key and value width.

Paper: Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464), unrolled over a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_nn.kernels.checks import accumulation_dtype, check_shape


@dataclass(frozen=True)
class DeltaRing:
    """Tokens since each row's page boundary; a row's entries from its length on are unused.

    Unused entries may hold anything finite (they are multiplied by zero), so start from
    zeros and let old entries be.
    """

    k_RhPK: torch.Tensor
    u_RHPV: torch.Tensor
    log_decay_RHP: torch.Tensor

    def append_(self, lengths_R: torch.Tensor, k_RhK: torch.Tensor, step: RingStep) -> None:
        """Write one step's token behind each row's last entry, in place."""
        rows = torch.arange(lengths_R.shape[0], device=lengths_R.device)
        self.k_RhPK[rows, :, lengths_R] = k_RhK.to(self.k_RhPK.dtype)
        self.u_RHPV[rows, :, lengths_R] = step.u_RHV.to(self.u_RHPV.dtype)
        self.log_decay_RHP[rows, :, lengths_R] = step.log_decay_RH.to(self.log_decay_RHP.dtype)


@dataclass(frozen=True)
class RingStep:
    """One token's output and, beside its key, what the ring keeps of it."""

    out_RHV: torch.Tensor
    u_RHV: torch.Tensor
    log_decay_RH: torch.Tensor


def ring_mask(lengths_R: torch.Tensor, capacity: int) -> torch.Tensor:
    """`[R, 1, P]`: 0 for entries in use, +inf for the others; the same for all layers of a step."""
    entries = torch.arange(capacity, device=lengths_R.device)
    unused = entries >= lengths_R[:, None, None]
    return torch.zeros(unused.shape, device=lengths_R.device).masked_fill_(unused, torch.inf)


def gated_delta_ring_step(
    state_RHKV: torch.Tensor,
    ring: DeltaRing,
    mask_R1P: torch.Tensor,
    q_RhK: torch.Tensor,
    k_RhK: torch.Tensor,
    v_RHV: torch.Tensor,
    g_RH: torch.Tensor,
    beta_RH: torch.Tensor,
) -> RingStep:
    """Advance every row by one token without touching its state.

    `mask_R1P` comes from `ring_mask` for the lengths before this token.

    Returns: output, corrected value and log-decay, float32 (float64 for float64 states).
    """
    num_rows, num_heads, key_dim, value_dim = state_RHKV.shape
    num_key_heads, capacity = ring.k_RhPK.shape[1:3]
    check_shape("ring.k", ring.k_RhPK, (num_rows, num_key_heads, capacity, key_dim))
    check_shape("ring.u", ring.u_RHPV, (num_rows, num_heads, capacity, value_dim))
    check_shape("ring.log_decay", ring.log_decay_RHP, (num_rows, num_heads, capacity))
    check_shape("k", k_RhK, (num_rows, num_key_heads, key_dim))
    check_shape("v", v_RHV, (num_rows, num_heads, value_dim))
    dtype = accumulation_dtype(state_RHKV, g_RH)
    group = num_heads // num_key_heads

    # G only falls from token to token, so the last entry in use is the smallest one; with
    # +inf in the unused ones the minimum is +inf for an empty ring, where G starts at 0.
    ring_decay = ring.log_decay_RHP.to(dtype) + mask_R1P
    log_decay = g_RH + ring_decay.amin(-1).clamp(max=0.0)
    weights = (log_decay[..., None] - ring_decay).exp()

    pair = torch.stack((k_RhK, q_RhK), dim=2).to(dtype)
    ring_keys = ring.k_RhPK.to(dtype).view(num_rows * num_key_heads, capacity, key_dim)
    dots = torch.bmm(pair.view(-1, 2, key_dim), ring_keys.mT)
    ring_weights = dots.view(num_rows, num_key_heads, 1, 2, capacity) * weights.view(
        num_rows, num_key_heads, group, 1, capacity
    )
    decayed_pair = pair.unsqueeze(2) * log_decay.exp().view(num_rows, num_key_heads, group, 1, 1)
    from_state = torch.bmm(
        decayed_pair.view(-1, 2, key_dim), state_RHKV.to(dtype).view(-1, key_dim, value_dim)
    )
    ring_values = ring.u_RHPV.to(dtype).view(-1, capacity, value_dim)
    both = torch.baddbmm(from_state, ring_weights.view(-1, 2, capacity), ring_values)
    predicted, read = both.view(num_rows, num_heads, 2, value_dim).unbind(2)

    u = (v_RHV - predicted) * beta_RH[..., None]
    own = (pair[:, :, 0] * pair[:, :, 1]).sum(-1).repeat_interleave(group, dim=1)
    return RingStep(torch.addcmul(read, own[..., None], u), u, log_decay)


def gated_delta_ring_commit(
    state_RHKV: torch.Tensor, ring: DeltaRing, lengths_R: torch.Tensor
) -> torch.Tensor:
    """The state after each row's `lengths` ring entries, `[R, H, K, V]`; a length of 0 returns S.

    Call it on the rows whose page is full, then let their ring begin anew. It also gives
    the state in the middle of a page, where a prefill chunk goes on from a partial one.
    """
    group = state_RHKV.shape[1] // ring.k_RhPK.shape[1]
    dtype = accumulation_dtype(state_RHKV)
    log_decay = ring.log_decay_RHP.to(dtype) + ring_mask(lengths_R, ring.log_decay_RHP.shape[-1])
    total = log_decay.amin(-1, keepdim=True).clamp(max=0.0)
    weights = (total - log_decay).exp()[..., None]
    keys = ring.k_RhPK.to(dtype).repeat_interleave(group, dim=1)
    written = (keys * weights).mT @ ring.u_RHPV.to(dtype)
    return total.exp()[..., None] * state_RHKV.to(dtype) + written
