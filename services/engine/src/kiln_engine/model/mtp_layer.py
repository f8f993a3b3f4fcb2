"""The multi-token-prediction layer over KV pages: it guesses the tokens after the one drawn last.

Its entry for a token joins the token's embedding with the main model's hidden state of the token before, and
predicts the token after. Keys and values of that entry lie where those of the main layers for the same
token do, in a layer of their own, so what a page holds depends on nothing behind it and is right for
whoever shares the page. Every pass of the main model writes them for its tokens (`write`); that takes no
attention. While drafting (`forward`) the layer's own hidden state stands in for the main model's, and the
next pass overwrites what that left. A sequence's first token has no entry.

The same function as `PackedModel.mtp_hidden_states`, whose position t is the entry of token t + 1.

Legend: `T` tokens of a pass, `R` rows, `D` hidden width, `V` tokens a draft is chosen from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kiln_engine.model.carried_hidden import CarriedHidden
from kiln_engine.model.linears import Linears
from kiln_engine.model.page_table import PageTable
from kiln_engine.model.step_layout import StepLayout
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.draft_rows import draft_places
from kiln_nn.kernels.joined_inputs import CarriedLines, joined_inputs
from kiln_nn.kernels.paged_attention import paged_decode_attention
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from kiln_nn.kernels.quantised import whole
from kiln_nn.kernels.rms_norm import add_rms_norm, rms_norm
from kiln_nn.kernels.rotary import inverse_frequencies
from kiln_nn.weights.names import EMBEDDING

_PREFIX = "mtp.layers.0"
# The entry of a sequence's first token would need a token before it.
_NUM_WITHOUT_ENTRY = 1

MtpHidden = Literal["normed", "residual"]


@dataclass(frozen=True)
class DraftPlaces:
    """Where the rows that draft find their pages, as int64 tensors `[R]` on the device."""

    # Each row's line of the page table.
    table_rows_R: torch.Tensor
    # Tokens that the row's pages have room for; 0 for a padding row.
    limits_R: torch.Tensor


class MtpLayer:
    """The layer, its part of the cache, and the hidden states it is fed with.

    `hidden` says which of the main model's hidden states it reads: that after the final norm (as the
    released models are trained) or the one before it. Called by the thread that runs the steps.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        caches: tuple[torch.Tensor, torch.Tensor],
        pages: PageTable,
        carried: CarriedHidden,
        *,
        hidden: MtpHidden = "normed",
    ) -> None:
        assert config.num_mtp_layers == 1, config.num_mtp_layers
        self.carried = carried
        self.reads_normed = hidden == "normed"
        self._config = config
        self._weights = weights
        self._caches = caches
        self._page_tokens = caches[0].shape[1]
        self._pages = pages
        self._inverse_frequencies = inverse_frequencies(config, caches[0].device)

    def write(self, layout: StepLayout, hidden_TD: torch.Tensor, linears: Linears) -> None:
        """Write the entries of a pass's tokens, and keep the hidden states that the next pass needs.

        `hidden_TD` are the main model's, of the kind that the layer reads.
        """
        before = self.carried.before(layout.carried_slots_T)
        joined_TD = self._joined(layout.token_ids_T, hidden_TD, linears, before)
        x = self._norm(joined_TD, f"{_PREFIX}.input_layernorm")
        num_kv_heads, width = self._config.num_kv_heads, self._config.head_dim
        k, v = linears.apply(f"{_PREFIX}.self_attn.kv_proj", x).view(-1, 2, num_kv_heads, width).unbind(1)
        # Nobody asks anything here: the keys stand in for the queries.
        self._write_and_rotate(k, k, v, layout.positions_T, layout.token_slots_T)
        if layout.verify is not None:
            lines_RND = hidden_TD.view(-1, layout.verify.num_lines, hidden_TD.shape[1])
            self.carried.keep_lines(layout.last_slots, lines_RND)
        else:
            last = hidden_TD if layout.last_tokens is None else hidden_TD[layout.last_tokens]
            self.carried.keep(layout.last_slots, last)

    def forward(
        self,
        token_ids_R: torch.Tensor,
        hidden_RD: torch.Tensor,
        positions_R: torch.Tensor,
        places: DraftPlaces,
        linears: Linears,
    ) -> torch.Tensor:
        """Take one more token per row, and its predecessor's hidden state: the layer's own after it, `[R, D]`.

        The tokens are at `positions_R`. It is of the kind the layer reads, so it can be fed back with
        the next token; `logits` takes it as well. What comes out for a row without room means nothing.
        """
        config, path = self._config, f"{_PREFIX}.self_attn"
        num_heads, num_kv_heads, width = config.num_attention_heads, config.num_kv_heads, config.head_dim
        residual = self._joined(token_ids_R, hidden_RD, linears)
        x = self._norm(residual, f"{_PREFIX}.input_layernorm")
        qkv = linears.apply(f"{path}.qkv_proj", x)
        q_and_gate, k, v = qkv.split(
            (2 * num_heads * width, num_kv_heads * width, num_kv_heads * width), dim=1
        )
        q, gate = q_and_gate.view(-1, num_heads, 2, width).unbind(2)
        k, v = k.view(-1, num_kv_heads, width), v.view(-1, num_kv_heads, width)
        slots_R, context_lengths_R = draft_places(
            positions_R, places.limits_R, places.table_rows_R, self._pages.lines_SM, self._page_tokens
        )
        attended = paged_decode_attention(
            self._write_and_rotate(q, k, v, positions_R, slots_R),
            *self._caches,
            self._pages.lines_SM,
            context_lengths_R,
            width**-0.5,
            gate_RHD=gate,
            table_rows_R=places.table_rows_R,
            num_skipped=_NUM_WITHOUT_ENTRY,
        )
        mixed = linears.partials(f"{path}.o_proj", whole(attended).flatten(1))
        x, residual = self._add_norm(mixed, residual, f"{_PREFIX}.post_attention_layernorm")
        fed = linears.partials(f"{_PREFIX}.mlp.down_proj", linears.gated(f"{_PREFIX}.mlp.gate_up_proj", x))
        normed, residual = self._add_norm(fed, residual, "mtp.norm")
        return normed if self.reads_normed else residual

    def logits(
        self, hidden_RD: torch.Tensor, linears: Linears, num_tokens: int | None = None
    ) -> torch.Tensor:
        """Float32 logits `[R, V]` over the first `num_tokens` of the vocabulary, or all of it.

        Token ids of a BPE tokenizer rise as pairs get rarer, so that the first ones are most of a text.
        """
        normed = hidden_RD if self.reads_normed else self._norm(hidden_RD, "mtp.norm")
        return linears.head(normed, num_tokens=num_tokens)

    def _joined(
        self,
        token_ids_T: torch.Tensor,
        hidden_TD: torch.Tensor,
        linears: Linears,
        before: CarriedLines | None = None,
    ) -> torch.Tensor:
        """Tokens joined with the hidden states of their rows, or with those that `before` finds for them."""
        inputs_TI = joined_inputs(
            self._weights[EMBEDDING],
            token_ids_T,
            hidden_TD,
            self._weights["mtp.pre_fc_norm_embedding.weight"],
            self._weights["mtp.pre_fc_norm_hidden.weight"],
            self._config.rms_norm_eps,
            carried=before,
        )
        return linears.apply("mtp.fc", inputs_TI)

    def _write_and_rotate(
        self,
        q_THD: torch.Tensor,
        k_ThD: torch.Tensor,
        v_ThD: torch.Tensor,
        positions_T: torch.Tensor,
        token_slots_T: torch.Tensor,
    ) -> torch.Tensor:
        path = f"{_PREFIX}.self_attn"
        return qk_norm_rope_write(
            q_THD,
            k_ThD,
            v_ThD,
            self._weights[f"{path}.q_norm.weight"],
            self._weights[f"{path}.k_norm.weight"],
            self._config.rms_norm_eps,
            positions_T,
            self._inverse_frequencies,
            token_slots_T,
            *self._caches,
        )

    def _norm(self, x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x_TD, self._weights[f"{name}.weight"], self._config.rms_norm_eps, offset=1.0)

    def _add_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._weights[f"{name}.weight"]
        return add_rms_norm(x_TD, residual_TD, weight, self._config.rms_norm_eps, offset=1.0)
