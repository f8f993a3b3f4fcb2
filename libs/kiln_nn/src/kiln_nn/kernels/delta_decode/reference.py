"""One decode step of a DeltaNet layer, composed of the reference operations.

Legend: see `memory.py`.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.causal_conv import causal_conv_step
from kiln_nn.kernels.delta_decode.memory import (
    CommitIndices,
    DeltaDecodeWeights,
    DeltaMemory,
    DeltaRows,
)
from kiln_nn.kernels.gated_delta import (
    DeltaRing,
    delta_rule_gates,
    delta_rule_heads,
    gated_delta_ring_commit,
    gated_delta_ring_step,
)
from kiln_nn.kernels.rms_norm import gated_rms_norm


def delta_decode_reference(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
    *,
    commits: bool = True,
) -> torch.Tensor:
    """See `delta_decode`; float64 throughout if the memory and the inputs are float64."""
    index = rows.indices(memory)
    padded = z_RHV
    if index.active is not None:
        mixed_RC, a_RH, b_RH, z_RHV = (x.index_select(0, index.active) for x in (mixed_RC, a_RH, b_RH, z_RHV))
    num_rows, num_channels = mixed_RC.shape
    conv_rows = memory.conv_rows_SQC.view(-1, num_channels)
    tails_RJC = conv_rows.index_select(0, index.conv_window).view(num_rows, -1, num_channels)
    conv_rows.index_copy_(0, index.conv_targets, mixed_RC.to(conv_rows.dtype))
    num_key_heads, _, key_dim = memory.ring.k_RhPK.shape[1:]
    q, k, v = delta_rule_heads(
        causal_conv_step(mixed_RC, tails_RJC, weights.conv_CW), num_key_heads, key_dim, z_RHV.shape[-1]
    )
    g, beta = delta_rule_gates(a_RH, b_RH, weights.A_log_H, weights.dt_bias_H)
    state = memory.state_SHKV.index_select(0, index.read_slots)
    ring = rings_of(memory.ring, index.ring_slots)
    step = gated_delta_ring_step(state, ring, index.mask_R1P, q, k, v, g, beta)
    _put(memory.ring.k_RhPK, 3, index.key_entries, k)
    _put(memory.ring.u_RHPV, 3, index.value_entries, step.u_RHV)
    _put(memory.ring.log_decay_RHP, 3, index.value_entries, step.log_decay_RH)
    if commits and index.commit is not None:
        _commit(memory, index.commit, state.index_select(0, index.commit.rows))
    out = gated_rms_norm(step.out_RHV, z_RHV, weights.norm_V, weights.norm_eps)
    if index.active is None:
        return out
    return torch.zeros_like(padded).index_copy_(0, index.active, out)


def delta_commit_reference(layers: DeltaMemory, rows: DeltaRows) -> None:
    """See `delta_commit`."""
    for layer in range(layers.state_SHKV.shape[0]):
        memory = layers.layer(layer)
        index = rows.indices(memory)
        if index.commit is None:
            return
        _commit(memory, index.commit, memory.state_SHKV.index_select(0, index.commit.read_slots))


def rings_of(ring: DeltaRing, slots: torch.Tensor) -> DeltaRing:
    """Copies of some slots' rings."""
    return DeltaRing(
        ring.k_RhPK.index_select(0, slots),
        ring.u_RHPV.index_select(0, slots),
        ring.log_decay_RHP.index_select(0, slots),
    )


def _put(ring: torch.Tensor, num_entry_dims: int, entries: torch.Tensor, values: torch.Tensor) -> None:
    """Write ring entries by their flat number over slot, head and place."""
    ring.flatten(0, num_entry_dims - 1).index_copy_(0, entries, values.flatten(0, 1).to(ring.dtype))


def _commit(memory: DeltaMemory, commit: CommitIndices, state_NHKV: torch.Tensor) -> None:
    """Fold the rings into new states; the states they started from stay as they are."""
    states = gated_delta_ring_commit(state_NHKV, rings_of(memory.ring, commit.ring_slots), commit.lengths)
    memory.state_SHKV.index_copy_(0, commit.to_slots, states.to(memory.state_SHKV.dtype))
    conv_rows = memory.conv_rows_SQC.view(-1, memory.conv_rows_SQC.shape[-1])
    conv_rows.index_copy_(0, commit.tail_targets, conv_rows.index_select(0, commit.tail_sources))
