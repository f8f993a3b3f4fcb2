"""Qwen3.5 over KV pages and state slots: the forward pass of one engine step.

Decode rows go through the layers as one batch, prefill chunks as one packed run; the linear
layers see all of them together. Verify rows are a pass of their own, whose lines attend one by one.
What a sequence remembers is in the two stores. On a GPU a pass waits for nothing on the host, so that
one over fixed buffers can be captured in a graph.

Legend: `T` tokens of the step (decode rows first), `R` decode rows, `D` hidden width.
"""

from __future__ import annotations

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model.kv_store import KvStore
from kiln_engine.model.linears import BaseMatrices, Linears
from kiln_engine.model.mtp_layer import MtpLayer
from kiln_engine.model.page_table import PageTable
from kiln_engine.model.state_store import StateStore
from kiln_engine.model.step_layout import StepLayout, begun_pages, build_layout, moved_to_slots
from kiln_engine.model.store_shape import StoreShape
from kiln_engine.model.transfers import to_device
from kiln_nn.blocks import Weights, conv_weight, embed
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.delta_decode import (
    DeltaDecodeWeights,
    delta_commit,
    delta_decode,
    delta_fold,
    delta_verify,
)
from kiln_nn.kernels.delta_prefill import delta_prefill
from kiln_nn.kernels.paged_attention import paged_chunk_attention, paged_decode_attention
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from kiln_nn.kernels.quantised import QuantisedMatrix, RoundedRows, Rows, whole
from kiln_nn.kernels.rms_norm import add_rms_norm, add_rms_norm_rounded, rms_norm, rms_norm_rounded
from kiln_nn.kernels.rotary import inverse_frequencies
from kiln_nn.weights.names import EMBEDDING

_MIXER_INPUT = {"linear_attention": "linear_attn.in_proj", "full_attention": "self_attn.qkv_proj"}


class PagedModel:
    """The model and its memory. `forward` is called by one thread, one step after the other.

    If it is batch-invariant, what the kernels make of a row or a chunk has the same bits in every
    step. References do not take part in that.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv: KvStore,
        states: StateStore,
        max_model_len: int,
        *,
        small_head_VD: QuantisedMatrix | None = None,
        is_batch_invariant: bool = False,
    ) -> None:
        # Set where drafts are made by it: then every pass leaves what that layer needs.
        self.mtp: MtpLayer | None = None
        self.config = config
        self.weights = weights
        self.kv = kv
        self.states = states
        self.device = weights["model.norm.weight"].device
        self.shape = StoreShape.of(
            page_tokens=kv.page_tokens,
            max_model_len=max_model_len,
            num_state_slots=states.num_slots,
            num_grouped_heads=config.num_attention_heads // config.num_kv_heads,
            # Float32 has no larger ones.
            graph_tile_rows=16 if weights[EMBEDDING].dtype is torch.float32 else 64,
            has_one_tile_size=is_batch_invariant,
        )
        self.is_batch_invariant = is_batch_invariant
        self.pages = PageTable(self.shape, self.device)
        self.matrices = BaseMatrices(
            config, weights, small_head_VD=small_head_VD, is_batch_invariant=is_batch_invariant
        )
        self._inverse_frequencies = inverse_frequencies(config, self.device)
        # Place of each layer among those of its kind.
        kinds = config.layer_types
        self._index_in_kind = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
        self._delta_weights = [
            _delta_weights(config, weights, f"model.layers.{index}")
            for index, kind in enumerate(kinds)
            if kind == "linear_attention"
        ]
        # The norm that ends each layer: the next one's first, or the last of all.
        self._end_norms = [
            f"model.layers.{index}.input_layernorm.weight" for index in range(1, len(kinds))
        ] + ["model.norm.weight"]
        # The linear layers that read what each of those norms makes; the head's and others' rows stay whole.
        self._mixer_inputs: list[str | None] = [
            f"model.layers.{index}.{_MIXER_INPUT[kind]}" for index, kind in enumerate(kinds)
        ]
        self._mixer_inputs.append(None)

    def layout(self, plan: BatchPlan) -> StepLayout:
        """The plan's index tensors, on the model's device."""
        return build_layout(plan, self.shape, self.device)

    def prepare(self, plan: BatchPlan, *, has_clean_memory: bool = True) -> None:
        """Bring the stores to where the plan's forward pass expects them.

        With `has_clean_memory`, nothing that an earlier owner left behind is where the pass looks: the
        references need that, the kernels do not.
        """
        self.pages.update(plan)
        if not has_clean_memory:
            return
        if pages := begun_pages(plan, self.shape.page_tokens):
            self.kv.begin_pages(to_device(pages, self.device))
        if slots := moved_to_slots(plan):
            self.states.clear_rings(to_device(slots, self.device))

    def forward(
        self, layout: StepLayout, linears: Linears | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one step and write what it leaves in the stores, which `prepare` has made ready.

        `linears` are the linear layers with each row's adapters; None is the bare base model. The
        logits go to `out` if it is given.

        Returns: float32 logits `[samples, vocabulary]` of the tokens that are sampled after.
        """
        linears = linears or Linears(self.matrices)
        return self.logits(self.hidden_states(layout, linears), layout, linears, out=out)

    def logits(
        self,
        x_TD: torch.Tensor,
        layout: StepLayout,
        linears: Linears,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 logits of the tokens that are sampled after, from all tokens' final hidden states."""
        if layout.sample_tokens is not None:
            x_TD = x_TD.index_select(0, layout.sample_tokens)
        return linears.head(x_TD, out)

    def hidden_states(self, layout: StepLayout, linears: Linears) -> torch.Tensor:
        """`forward` without the head: every token's hidden state after the final norm, `[T, D]`."""
        if layout.verify is not None:
            delta_fold(self.states.all_layers, layout.verify.delta)
        # This starts no dependents: what lay in memory before it may be read early by all that follow.
        residual = embed(self.weights, layout.token_ids_T)
        first = "model.layers.0.input_layernorm.weight"
        x = self._norm(residual, first, self._mixer_inputs[0], linears)
        for index, kind in enumerate(self.config.layer_types):
            prefix, place = f"model.layers.{index}", self._index_in_kind[index]
            mix = self._deltanet if kind == "linear_attention" else self._attention
            mixed = mix(prefix, place, x, layout, linears)
            post, gate_up = f"{prefix}.post_attention_layernorm.weight", f"{prefix}.mlp.gate_up_proj"
            x, residual = self._add_norm(mixed, residual, post, gate_up, linears)
            fed = linears.partials(f"{prefix}.mlp.down_proj", linears.gated(gate_up, x))
            end, reader = self._end_norms[index], self._mixer_inputs[index + 1]
            x, residual = self._add_norm(fed, residual, end, reader, linears)
        hidden_TD = whole(x)
        if layout.decode is not None:
            delta_commit(self.states.all_layers, layout.decode.delta)
        if self.mtp is not None:
            self.mtp.write(layout, hidden_TD if self.mtp.reads_normed else residual, linears)
        return hidden_TD

    def _norm(self, x_TD: torch.Tensor, name: str, reader: str | None, linears: Linears) -> Rows:
        """Normed rows, rounded too where the linear layer that reads them wants them so."""
        order = None if reader is None else linears.reads_rounded(reader, x_TD)
        args = (x_TD, self.weights[name], self.config.rms_norm_eps)
        if order is None:
            return rms_norm(*args, offset=1.0)
        return rms_norm_rounded(*args, offset=1.0, order=order)

    def _add_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, name: str, reader: str | None, linears: Linears
    ) -> tuple[Rows, torch.Tensor]:
        order = None if reader is None else linears.reads_rounded(reader, residual_TD)
        args = (x_TD, residual_TD, self.weights[name], self.config.rms_norm_eps)
        if order is None:
            return add_rms_norm(*args, offset=1.0)
        return add_rms_norm_rounded(*args, offset=1.0, order=order)

    def _attention(
        self, prefix: str, kv_layer: int, x: Rows, layout: StepLayout, linears: Linears
    ) -> torch.Tensor:
        config, path = self.config, f"{prefix}.self_attn"
        num_heads, num_kv_heads, width = config.num_attention_heads, config.num_kv_heads, config.head_dim
        qkv = linears.apply(f"{path}.qkv_proj", x)
        q_and_gate, k, v = qkv.split(
            (2 * num_heads * width, num_kv_heads * width, num_kv_heads * width), dim=1
        )
        # q_proj's rows lie head by head as [query | gate].
        q, gate = q_and_gate.view(-1, num_heads, 2, width).unbind(2)
        caches = self.kv.layer(kv_layer)
        q = qk_norm_rope_write(
            q,
            k.view(-1, num_kv_heads, width),
            v.view(-1, num_kv_heads, width),
            self.weights[f"{path}.q_norm.weight"],
            self.weights[f"{path}.k_norm.weight"],
            config.rms_norm_eps,
            layout.positions_T,
            self._inverse_frequencies,
            layout.token_slots_T,
            *caches,
        )
        scale, num_rows = width**-0.5, layout.num_decode_rows
        outputs: list[torch.Tensor | RoundedRows] = []
        o_proj = f"{path}.o_proj"
        if layout.single_tokens is not None:
            context_lengths, table_rows = layout.single_tokens
            outputs.append(
                paged_decode_attention(
                    q[:num_rows],
                    *caches,
                    self.pages.lines_SM,
                    context_lengths,
                    scale,
                    gate_RHD=gate[:num_rows],
                    table_rows_R=table_rows,
                    rows_per_sequence=1 if layout.verify is None else layout.verify.num_lines,
                    is_batch_invariant=self.is_batch_invariant,
                    rounds=layout.prefill is None and linears.reads_rounded_groups(o_proj, q.flatten(1)),
                )
            )
        if layout.prefill is not None:
            outputs.append(
                paged_chunk_attention(
                    q[num_rows:],
                    *caches,
                    self.pages.lines_SM,
                    layout.prefill.attention,
                    scale,
                    gate_THD=gate[num_rows:],
                    table_rows_N=layout.prefill.table_rows_N,
                    is_batch_invariant=self.is_batch_invariant,
                )
            )
        return linears.partials(o_proj, _joined(outputs))

    def _deltanet(
        self, prefix: str, state_layer: int, x: Rows, layout: StepLayout, linears: Linears
    ) -> torch.Tensor:
        config, path = self.config, f"{prefix}.linear_attn"
        num_heads = config.linear_num_value_heads
        projected = linears.apply(f"{path}.in_proj", x)
        mixed, z, b, a = projected.split((config.conv_dim, config.value_dim, num_heads, num_heads), dim=1)
        out_proj = f"{path}.out_proj"
        rounds = layout.prefill is None and linears.reads_rounded_groups(out_proj, z)
        z = z.view(-1, num_heads, config.linear_value_head_dim)
        own, slots = self._delta_weights[state_layer], self.states.layer(state_layer).slots
        num_rows, is_invariant = layout.num_decode_rows, self.is_batch_invariant
        outputs: list[torch.Tensor | RoundedRows] = []
        if layout.decode is not None:
            rows = (part[:num_rows] for part in (mixed, a, b, z))
            delta = layout.decode.delta
            outputs.append(
                delta_decode(
                    slots,
                    delta,
                    own,
                    *rows,
                    commits=False,
                    is_batch_invariant=is_invariant,
                    rounds=rounds,
                    reads_early=True,
                )
            )
        if layout.verify is not None:
            verify = layout.verify
            lines = (part.unflatten(0, (-1, verify.num_lines)) for part in (mixed, a, b, z))
            out = delta_verify(slots, verify.delta, verify.num_new_R, own, *lines, folds=False)
            outputs.append(out.flatten(0, 1))
        if layout.prefill is not None:
            tokens = (part[num_rows:] for part in (mixed, a, b, z))
            chunks = layout.prefill.delta
            outputs.append(delta_prefill(slots, chunks, own, *tokens, is_batch_invariant=is_invariant))
        return linears.partials(out_proj, _joined(outputs))


def _joined(parts: list[torch.Tensor | RoundedRows]) -> Rows:
    """The rows `[T, I]` of all parts, whose outputs are still by head; one alone may be rounded."""
    if len(parts) > 1:
        return torch.cat([whole(part).flatten(1) for part in parts])
    (part,) = parts
    return part if isinstance(part, RoundedRows) else part.flatten(1)


def _delta_weights(config: ModelConfig, weights: Weights, prefix: str) -> DeltaDecodeWeights:
    path = f"{prefix}.linear_attn"
    return DeltaDecodeWeights(
        conv_CW=conv_weight(weights, prefix),
        A_log_H=weights[f"{path}.A_log"],
        dt_bias_H=weights[f"{path}.dt_bias"],
        norm_V=weights[f"{path}.norm.weight"],
        norm_eps=config.rms_norm_eps,
    )
