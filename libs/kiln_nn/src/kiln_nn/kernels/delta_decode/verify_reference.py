"""Several new tokens per row on top of single steps that commit nothing.

Legend: see `memory.py`; `N` most new tokens of a row.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.delta_decode.memory import (
    NO_SLOT,
    DeltaDecodeWeights,
    DeltaMemory,
    DeltaRows,
)
from kiln_nn.kernels.delta_decode.reference import delta_decode_reference
from kiln_nn.kernels.gated_delta import DeltaRing, gated_delta_ring_commit


def delta_verify_reference(
    memory: DeltaMemory,
    rows: DeltaRows,
    num_new_R: torch.Tensor,
    weights: DeltaDecodeWeights,
    mixed_RNC: torch.Tensor,
    a_RNH: torch.Tensor,
    b_RNH: torch.Tensor,
    z_RNHV: torch.Tensor,
) -> torch.Tensor:
    """See `delta_verify`; float64 throughout if the memory and the inputs are float64."""
    begun = _fold_full_pages(memory, rows)
    nowhere = torch.full_like(rows.commit_slots_R, NO_SLOT)
    outputs = torch.zeros_like(z_RNHV)
    for place in range(mixed_RNC.shape[1]):
        is_new = place < num_new_R
        if not bool((is_new & (begun.ring_slots_R >= 0)).any()):
            break
        ring_slots = torch.where(is_new, begun.ring_slots_R, nowhere)
        step = DeltaRows(begun.read_slots_R, ring_slots, begun.lengths_R + place, nowhere)
        inputs = (x[:, place] for x in (mixed_RNC, a_RNH, b_RNH, z_RNHV))
        outputs[:, place] = delta_decode_reference(memory, step, weights, *inputs)
    return outputs


def _fold_full_pages(memory: DeltaMemory, rows: DeltaRows) -> DeltaRows:
    """Commit the first page of the rings that ask for it; where the rows stand after that."""
    folds = (rows.commit_slots_R >= 0).nonzero().flatten()
    for row in folds.tolist():
        read, ring, length, target = (
            int(x[row]) for x in (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R)
        )
        _fold(memory, read, ring, length, target)
    is_folded = rows.commit_slots_R >= 0
    return DeltaRows(
        torch.where(is_folded, rows.commit_slots_R, rows.read_slots_R),
        torch.where(is_folded, rows.commit_slots_R, rows.ring_slots_R),
        torch.where(is_folded, rows.lengths_R - memory.page_tokens, rows.lengths_R),
        rows.commit_slots_R,
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
