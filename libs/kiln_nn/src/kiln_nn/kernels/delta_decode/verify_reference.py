"""Several new tokens per row at once, behind the ring, of which nothing is committed.

Legend: see `memory.py`; `N` most new tokens of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype
from kiln_nn.kernels.delta_decode.memory import (
    NO_SLOT,
    DeltaDecodeWeights,
    DeltaMemory,
    DeltaRows,
)
from kiln_nn.kernels.delta_decode.reference import rings_of
from kiln_nn.kernels.gated_delta import (
    DeltaRing,
    delta_rule_gates,
    delta_rule_heads,
    gated_delta_ring_commit,
    gated_delta_ring_lines,
)
from kiln_nn.kernels.rms_norm import gated_rms_norm


def delta_verify_reference(
    memory: DeltaMemory,
    rows: DeltaRows,
    num_new_R: torch.Tensor,
    weights: DeltaDecodeWeights,
    mixed_RNC: torch.Tensor,
    a_RNH: torch.Tensor,
    b_RNH: torch.Tensor,
    z_RNHV: torch.Tensor,
    *,
    folds: bool = True,
) -> torch.Tensor:
    """See `delta_verify`; float64 throughout if the memory and the inputs are float64."""
    if folds:
        delta_fold_reference(memory.as_layers(), rows)
    begun = _behind_folds(memory, rows)
    index = begun.indices(memory)
    outputs = torch.zeros_like(z_RNHV)
    if not index.ring_slots.numel():
        return outputs
    if index.active is not None:
        lines = (num_new_R, mixed_RNC, a_RNH, b_RNH, z_RNHV)
        num_new_R, mixed_RNC, a_RNH, b_RNH, z_RNHV = (x.index_select(0, index.active) for x in lines)
    num_rows, num_lines = mixed_RNC.shape[:2]
    is_new_RN = torch.arange(num_lines, device=num_new_R.device) < num_new_R[:, None]
    # Whatever stands in the other lines must not get into products with zero.
    mixed_RNC, a_RNH, b_RNH = (
        torch.where(is_new_RN[..., None], x, x.new_zeros(())) for x in (mixed_RNC, a_RNH, b_RNH)
    )
    num_key_heads, _, key_dim = memory.ring.k_RhPK.shape[1:]
    convolved = _convolve(memory, index.conv_window, weights.conv_CW, mixed_RNC)
    heads = delta_rule_heads(convolved.flatten(0, 1), num_key_heads, key_dim, z_RNHV.shape[-1])
    q, k, v = (x.unflatten(0, (num_rows, num_lines)) for x in heads)
    g, beta = delta_rule_gates(a_RNH, b_RNH, weights.A_log_H, weights.dt_bias_H)
    state = memory.state_SHKV.index_select(0, index.read_slots)
    ring = rings_of(memory.ring, index.ring_slots)
    done = gated_delta_ring_lines(state, ring, index.mask_R1P, q, k, v, g, beta)
    out = gated_rms_norm(done.out_RNHV, z_RNHV, weights.norm_V, weights.norm_eps)

    rows_T, lines_T = is_new_RN.nonzero(as_tuple=True)
    lengths_R = begun.lengths_R if index.active is None else begun.lengths_R[index.active]
    slots_T, places_T = index.ring_slots[rows_T], lengths_R[rows_T] + lines_T
    memory.ring.k_RhPK[slots_T, :, places_T] = k[rows_T, lines_T].to(memory.ring.k_RhPK.dtype)
    memory.ring.u_RHPV[slots_T, :, places_T] = done.u_RHNV[rows_T, :, lines_T].to(memory.ring.u_RHPV.dtype)
    memory.ring.log_decay_RHP[slots_T, :, places_T] = done.log_decay_RHN[rows_T, :, lines_T].to(
        memory.ring.log_decay_RHP.dtype
    )
    num_tail_rows = weights.conv_CW.shape[1] - 1
    memory.conv_rows_SQC[slots_T, num_tail_rows + places_T] = mixed_RNC[rows_T, lines_T].to(
        memory.conv_rows_SQC.dtype
    )
    outputs[rows_T if index.active is None else index.active[rows_T], lines_T] = out[rows_T, lines_T]
    return outputs


def _convolve(
    memory: DeltaMemory, conv_window: torch.Tensor, conv_CW: torch.Tensor, mixed_RNC: torch.Tensor
) -> torch.Tensor:
    """The lines convolved with what is before each, and their SiLU, `[R, N, C]`."""
    num_rows, num_lines, num_channels = mixed_RNC.shape
    conv_rows = memory.conv_rows_SQC.view(-1, num_channels)
    tails_RJC = conv_rows.index_select(0, conv_window).view(num_rows, -1, num_channels)
    dtype = accumulation_dtype(mixed_RNC)
    inputs, taps = torch.cat((tails_RJC.to(dtype), mixed_RNC.to(dtype)), dim=1), conv_CW.to(dtype).t()
    first, *others = (inputs[:, tap : tap + num_lines] * taps[tap] for tap in range(taps.shape[0]))
    return F.silu(sum(others, start=first))


def delta_fold_reference(layers: DeltaMemory, rows: DeltaRows) -> None:
    """See `delta_fold`."""
    for row in (rows.commit_slots_R >= 0).nonzero().flatten().tolist():
        read, ring, length, target = (
            int(x[row]) for x in (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R)
        )
        for layer in range(layers.state_SHKV.shape[0]):
            _fold(layers.layer(layer), read, ring, length, target)


def _behind_folds(memory: DeltaMemory, rows: DeltaRows) -> DeltaRows:
    """Where the rows stand once the full pages are folded."""
    is_folded = rows.commit_slots_R >= 0
    return DeltaRows(
        torch.where(is_folded, rows.commit_slots_R, rows.read_slots_R),
        torch.where(is_folded, rows.commit_slots_R, rows.ring_slots_R),
        torch.where(is_folded, rows.lengths_R - memory.page_tokens, rows.lengths_R),
        torch.full_like(rows.commit_slots_R, NO_SLOT),
    )


def _fold(memory: DeltaMemory, read: int, ring: int, length: int, target: int) -> None:
    """The state after a ring's first page goes to `target`, with the tokens and rows behind it."""
    page, source = memory.page_tokens, memory.ring
    one = DeltaRing(
        source.k_RhPK[ring, None, :, :page],
        source.u_RHPV[ring, None, :, :page],
        source.log_decay_RHP[ring, None, :, :page],
    )
    num_tokens = torch.tensor([page], device=memory.state_SHKV.device)
    state = gated_delta_ring_commit(memory.state_SHKV[read, None], one, num_tokens)
    memory.state_SHKV[target] = state[0].to(memory.state_SHKV.dtype)
    at_boundary = source.log_decay_RHP[ring, :, page - 1, None].clone()
    left = slice(page, length)
    moved = (source.k_RhPK[ring, :, left], source.u_RHPV[ring, :, left], source.log_decay_RHP[ring, :, left])
    k, u, log_decay = (x.clone() for x in moved)
    source.k_RhPK[target, :, : length - page] = k
    source.u_RHPV[target, :, : length - page] = u
    source.log_decay_RHP[target, :, : length - page] = log_decay - at_boundary
    num_tail_rows = memory.conv_rows_SQC.shape[1] - source.k_RhPK.shape[2]
    kept = memory.conv_rows_SQC[ring, page : num_tail_rows + length].clone()
    memory.conv_rows_SQC[target, : kept.shape[0]] = kept
