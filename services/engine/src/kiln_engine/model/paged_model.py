"""Qwen3.5 over KV pages and state slots: the forward pass of one engine step.

Decode rows go through the layers as one batch, prefill chunks as one packed run; the linear
layers see all of them together. What a sequence remembers is in the two stores.

Legend: `T` tokens of the step (decode rows first), `R` decode rows, `D` hidden width, `C`
convolution channels, `J` rows of convolution tail, `H`/`h` value and key heads, `K`/`V` key and
value width, `P` ring capacity, `N` chunks, `S` slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model.decode_layout import AttentionGroup
from kiln_engine.model.index_lists import StoreShape
from kiln_engine.model.kv_store import KvStore
from kiln_engine.model.prefill_layout import PrefillLayout
from kiln_engine.model.state_store import LayerState, StateStore
from kiln_engine.model.step_layout import StepLayout, build_layout
from kiln_nn.blocks import (
    DeltaHeads,
    LinearFn,
    Weights,
    base_linear,
    conv_weight,
    decoder_norm,
    delta_gates,
    delta_heads,
    embed,
    finish_attention,
    head_weight,
    input_norm,
    mlp,
    mlp_norm,
    project_attention,
    project_deltanet,
)
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.causal_conv import causal_conv
from kiln_nn.kernels.delta_decode import DeltaDecodeWeights, delta_decode
from kiln_nn.kernels.gated_delta import gated_delta_chunked
from kiln_nn.kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from kiln_nn.kernels.rms_norm import gated_rms_norm
from kiln_nn.kernels.rotary import rotary_tables


class PagedModel:
    """The model and its memory. `forward` is called by one thread, one step after the other."""

    def __init__(self, config: ModelConfig, weights: Weights, kv: KvStore, states: StateStore) -> None:
        self.config = config
        self.weights = weights
        self.kv = kv
        self.states = states
        self.device = weights["model.norm.weight"].device
        # The linear layers without adapters.
        self.base_linear = base_linear(weights)
        self._head_weight = head_weight(config, weights)
        self._shape = StoreShape(
            page_tokens=kv.page_tokens,
            num_tail_rows=states.num_tail_rows,
            ring_capacity=states.capacity,
        )
        # Place of each layer among those of its kind.
        kinds = config.layer_types
        self._index_in_kind = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
        self._delta_weights = [
            _delta_weights(config, weights, f"model.layers.{index}")
            for index, kind in enumerate(kinds)
            if kind == "linear_attention"
        ]

    def layout(self, plan: BatchPlan) -> StepLayout:
        """The plan's index tensors, on the model's device."""
        return build_layout(plan, self._shape, self.device)

    def forward(self, layout: StepLayout, linear: LinearFn | None = None) -> torch.Tensor:
        """Run one step and write what it leaves in the stores.

        `linear` applies the linear layers (with each row's adapters); None is the bare base model.

        Returns: float32 logits `[samples, vocabulary]` of the tokens that are sampled after.
        """
        linear = linear or self.base_linear
        if layout.begun_pages.numel():
            self.kv.begin_pages(layout.begun_pages)
        if layout.moved_to_slots.numel():
            self.states.clear_rings(layout.moved_to_slots)
        rotary = rotary_tables(layout.positions_T, self.config)
        hidden = embed(self.weights, layout.token_ids_T)
        for index, kind in enumerate(self.config.layer_types):
            prefix = f"model.layers.{index}"
            x = input_norm(self.config, self.weights, prefix, hidden)
            if kind == "linear_attention":
                mixed = self._deltanet(prefix, self._index_in_kind[index], x, layout, linear)
            else:
                mixed = self._attention(prefix, self._index_in_kind[index], x, layout, rotary, linear)
            hidden = hidden + mixed
            hidden = hidden + mlp(prefix, mlp_norm(self.config, self.weights, prefix, hidden), linear)
        if layout.num_samples < layout.num_tokens:
            hidden = hidden.index_select(0, layout.sample_tokens)
        hidden = decoder_norm(self.config, self.weights, "model.norm", hidden)
        return F.linear(hidden, self._head_weight).float()

    def _attention(
        self,
        prefix: str,
        kv_layer: int,
        x_TD: torch.Tensor,
        layout: StepLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        linear: LinearFn,
    ) -> torch.Tensor:
        q, k, v, gate = project_attention(self.config, self.weights, prefix, x_TD, *rotary, linear)
        self.kv.write(kv_layer, layout.token_slots_T, k, v)
        caches, scale = self.kv.layer(kv_layer), self.config.head_dim**-0.5
        num_rows, outputs = layout.num_decode_rows, []
        if layout.decode is not None:
            outputs.append(_decode_attention(q[:num_rows], caches, layout.decode.attention, scale))
        if layout.prefill is not None:
            prefill = layout.prefill
            outputs.append(
                paged_prefill_attention(
                    q[num_rows:],
                    *caches,
                    prefill.page_tables,
                    prefill.cu_seqlens,
                    prefill.context_lengths,
                    scale,
                )
            )
        return finish_attention(prefix, _joined(outputs), gate, linear)

    def _deltanet(
        self, prefix: str, state_layer: int, x_TD: torch.Tensor, layout: StepLayout, linear: LinearFn
    ) -> torch.Tensor:
        projected = project_deltanet(self.config, prefix, x_TD, linear)
        own, memory = self._delta_weights[state_layer], self.states.layer(state_layer)
        num_rows, outputs = layout.num_decode_rows, []
        if layout.decode is not None:
            mixed, z, b, a = (part[:num_rows] for part in projected)
            outputs.append(delta_decode(memory.slots, layout.decode.delta, own, mixed, a, b, z))
        if layout.prefill is not None:
            mixed, z, b, a = (part[num_rows:] for part in projected)
            gates = delta_gates(self.weights, prefix, a, b)
            out = self._prefill_delta(layout.prefill, memory, own.conv_CW, mixed, *gates)
            outputs.append(gated_rms_norm(out, z, own.norm_V, own.norm_eps))
        return linear(f"{prefix}.linear_attn.out_proj", _joined(outputs).flatten(1))

    def _prefill_delta(
        self,
        layout: PrefillLayout,
        memory: LayerState,
        conv: torch.Tensor,
        mixed_TC: torch.Tensor,
        g_TH: torch.Tensor,
        beta_TH: torch.Tensor,
    ) -> torch.Tensor:
        """Chunks as one packed run; leaves states at the boundaries asked for, and the rings."""
        states_NHKV, tails_NJC = _first_states(layout, memory, mixed_TC.shape[1])
        convolved, _ = causal_conv(mixed_TC, conv, layout.cu_seqlens, tails_NJC)
        heads = delta_heads(self.config, convolved)
        run = gated_delta_chunked(
            *heads, g_TH, beta_TH, layout.cu_seqlens, states_NHKV, boundaries=layout.boundaries
        )
        if layout.boundary_slots.numel():
            memory.state_SHKV.index_copy_(0, layout.boundary_slots, run.boundary_states_BHKV)
        if layout.unmoved.numel():
            memory.state_SHKV.index_copy_(
                0, layout.unmoved_slots, states_NHKV.index_select(0, layout.unmoved)
            )
        tails_and_tokens = torch.cat((tails_NJC.flatten(0, 1), mixed_TC))
        memory.conv_rows_C.index_copy_(
            0, layout.tail_targets, tails_and_tokens.index_select(0, layout.tail_sources)
        )
        _fill_rings(layout, memory, heads, mixed_TC, g_TH, run.corrected_THV)
        return run.out_THV


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_attention(
    q_RHD: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    groups: Sequence[AttentionGroup],
    scale: float,
) -> torch.Tensor:
    if len(groups) == 1:
        (group,) = groups
        return paged_decode_attention(
            q_RHD.contiguous(), *caches, group.page_table_RM, group.context_lengths_R, scale
        )
    out = torch.empty_like(q_RHD)
    for group in groups:
        q = q_RHD.index_select(0, group.rows)
        part = paged_decode_attention(q, *caches, group.page_table_RM, group.context_lengths_R, scale)
        out.index_copy_(0, group.rows, part)
    return out


def _delta_weights(config: ModelConfig, weights: Weights, prefix: str) -> DeltaDecodeWeights:
    path = f"{prefix}.linear_attn"
    return DeltaDecodeWeights(
        conv_CW=conv_weight(weights, prefix),
        A_log_H=weights[f"{path}.A_log"],
        dt_bias_H=weights[f"{path}.dt_bias"],
        norm_V=weights[f"{path}.norm.weight"],
        norm_eps=config.rms_norm_eps,
    )


def _first_states(
    layout: PrefillLayout, memory: LayerState, num_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """State and convolution tail before each chunk: a slot's, or zeros at a sequence's start."""
    num_chunks = layout.read_slots_N.shape[0]
    if layout.all_fresh:
        states = memory.state_SHKV.new_zeros(num_chunks, *memory.state_SHKV.shape[1:])
        num_tail_rows = layout.initial_tail_rows.shape[0] // num_chunks
        return states, memory.conv_rows_C.new_zeros(num_chunks, num_tail_rows, num_channels)
    states = memory.state_SHKV.index_select(0, layout.read_slots_N)
    tails = memory.conv_rows_C.index_select(0, layout.initial_tail_rows)
    tails = tails.view(num_chunks, -1, num_channels)
    if layout.fresh_N is not None:
        states.masked_fill_(layout.fresh_N[:, None, None, None], 0)
        tails.masked_fill_(layout.fresh_N[:, None, None], 0)
    return states, tails


def _fill_rings(
    layout: PrefillLayout,
    memory: LayerState,
    heads: DeltaHeads,
    mixed_TC: torch.Tensor,
    g_TH: torch.Tensor,
    corrected_THV: torch.Tensor,
) -> None:
    """Put each chunk's tokens since its last boundary into its ring, zeros behind them."""
    num_chunks = layout.ring_slots_N.shape[0]

    def ring_rows(x: torch.Tensor) -> torch.Tensor:
        """[T, heads, ...] to [N, P, heads, ...], zeros where a ring ends."""
        padded = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
        return padded.index_select(0, layout.ring_tokens).view(num_chunks, -1, *x.shape[1:])

    # G counts from the boundary on, so its sum begins with the ring's first token.
    log_decay = ring_rows(g_TH).cumsum(1)
    memory.ring.k_RhPK.index_copy_(0, layout.ring_slots_N, ring_rows(heads.k_ThK).transpose(1, 2))
    memory.ring.u_RHPV.index_copy_(0, layout.ring_slots_N, ring_rows(corrected_THV).transpose(1, 2))
    memory.ring.log_decay_RHP.index_copy_(0, layout.ring_slots_N, log_decay.transpose(1, 2))
    if layout.ring_conv_tokens.numel():
        rows = mixed_TC.index_select(0, layout.ring_conv_tokens)
        memory.conv_rows_C.index_copy_(0, layout.ring_conv_targets, rows)
