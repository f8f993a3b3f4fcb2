"""Prefill chunks of a DeltaNet layer, composed of the reference operations. Waits for the device.

Legend: `T` tokens, `N` chunks, `H`/`h` value and key heads, `K`/`V` key and value width, `P` ring
capacity, `C` convolution channels (q|k|v), `J` rows of convolution tail, `S` slots.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.causal_conv import causal_conv
from kiln_nn.kernels.delta_decode import DeltaDecodeWeights, DeltaMemory
from kiln_nn.kernels.delta_prefill.chunks import ChunkIndices, DeltaChunks
from kiln_nn.kernels.gated_delta import (
    DeltaRun,
    delta_rule_gates,
    delta_rule_heads,
    gated_delta_chunked,
)
from kiln_nn.kernels.rms_norm import gated_rms_norm


def delta_prefill_reference(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    z_THV: torch.Tensor,
) -> torch.Tensor:
    """See `delta_prefill`; float64 throughout if the memory and the inputs are float64."""
    index = chunks.indices(memory)
    num_tokens = index.cu_seqlens[-1]
    if num_tokens < z_THV.shape[0]:
        out = torch.zeros_like(z_THV)
        if num_tokens:
            inputs = (x[:num_tokens] for x in (mixed_TC, a_TH, b_TH, z_THV))
            out[:num_tokens] = delta_prefill_reference(memory, chunks, weights, *inputs)
        return out
    states_NHKV, tails_NJC = _first_states(index, memory)
    convolved, _ = causal_conv(mixed_TC, weights.conv_CW, index.cu_seqlens, tails_NJC)
    num_key_heads, _, key_dim = memory.ring.k_RhPK.shape[1:]
    q, k, v = delta_rule_heads(convolved, num_key_heads, key_dim, z_THV.shape[-1])
    g, beta = delta_rule_gates(a_TH, b_TH, weights.A_log_H, weights.dt_bias_H)
    run = gated_delta_chunked(q, k, v, g, beta, index.cu_seqlens, states_NHKV, boundaries=index.boundaries)
    _write_states(index, memory, states_NHKV, run)
    _write_tails(index, memory, tails_NJC, mixed_TC)
    _fill_rings(index, memory, k, run.corrected_THV, g, mixed_TC)
    return gated_rms_norm(run.out_THV, z_THV, weights.norm_V, weights.norm_eps)


def _first_states(index: ChunkIndices, memory: DeltaMemory) -> tuple[torch.Tensor, torch.Tensor]:
    """State and convolution tail before each chunk: a slot's, or zeros at a sequence's start."""
    states = memory.state_SHKV.index_select(0, index.read_slots_N)
    tails = _conv_rows(memory).index_select(0, index.initial_tail_rows)
    tails = tails.view(len(states), -1, tails.shape[-1])
    states.masked_fill_(index.is_fresh_N[:, None, None, None], 0)
    return states, tails.masked_fill_(index.is_fresh_N[:, None, None], 0)


def _conv_rows(memory: DeltaMemory) -> torch.Tensor:
    """Row `slot * (J + P) + i` is place `i` of that slot's convolution rows."""
    return memory.conv_rows_SQC.view(-1, memory.conv_rows_SQC.shape[-1])


def _write_states(index: ChunkIndices, memory: DeltaMemory, first_NHKV: torch.Tensor, run: DeltaRun) -> None:
    states = memory.state_SHKV
    if index.boundary_slots.numel():
        states.index_copy_(0, index.boundary_slots, run.boundary_states_BHKV.to(states.dtype))
    if index.unmoved.numel():
        states.index_copy_(0, index.unmoved_slots, first_NHKV.index_select(0, index.unmoved))


def _write_tails(
    index: ChunkIndices, memory: DeltaMemory, tails_NJC: torch.Tensor, mixed_TC: torch.Tensor
) -> None:
    conv_rows = _conv_rows(memory)
    tails_and_tokens = torch.cat((tails_NJC.flatten(0, 1), mixed_TC.to(conv_rows.dtype)))
    conv_rows.index_copy_(0, index.tail_targets, tails_and_tokens.index_select(0, index.tail_sources))


def _fill_rings(
    index: ChunkIndices,
    memory: DeltaMemory,
    k_ThK: torch.Tensor,
    u_THV: torch.Tensor,
    g_TH: torch.Tensor,
    mixed_TC: torch.Tensor,
) -> None:
    """Put each chunk's tokens since its last boundary into its ring, zeros behind them."""
    num_rings, ring = index.ring_slots.shape[0], memory.ring
    if not num_rings:
        return

    def ring_rows(x: torch.Tensor) -> torch.Tensor:
        """[T, heads, ...] to [rings, P, heads, ...], zeros where a ring ends."""
        padded = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
        return padded.index_select(0, index.ring_tokens).view(num_rings, -1, *x.shape[1:])

    # G counts from the boundary on, so its sum begins with the ring's first token.
    is_used = (index.ring_tokens < g_TH.shape[0]).view(num_rings, -1, 1)
    log_decay = ring_rows(g_TH).cumsum(1) * is_used
    entries = (ring_rows(k_ThK), ring_rows(u_THV), log_decay)
    for kept, rows in zip((ring.k_RhPK, ring.u_RHPV, ring.log_decay_RHP), entries, strict=True):
        kept.index_copy_(0, index.ring_slots, rows.transpose(1, 2).to(kept.dtype))
    if index.ring_conv_tokens.numel():
        conv_rows = _conv_rows(memory)
        rows = mixed_TC.index_select(0, index.ring_conv_tokens).to(conv_rows.dtype)
        conv_rows.index_copy_(0, index.ring_conv_targets, rows)
