"""The model over packed documents, each with its whole past: what training runs.

Documents lie one after another in `T` tokens; `cu_seqlens` are the N + 1 boundaries.
Positions, attention, convolution and recurrence all start anew at each. The weights are
borrowed: nothing here copies or changes them.

Legend: `T` tokens, `N` documents, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from kiln_nn.blocks import (
    LinearFn,
    Weights,
    base_linear,
    conv_weight,
    decoder_norm,
    delta_gates,
    embed,
    finish_attention,
    finish_deltanet,
    head_weight,
    input_norm,
    mlp,
    mlp_norm,
    project_attention,
    project_deltanet,
)
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.checks import check_cu_seqlens
from kiln_nn.kernels.delta_train import delta_train, delta_train_heads
from kiln_nn.kernels.rotary import rotary_tables
from kiln_nn.kernels.varlen_attention import ATTENTION_OPERATORS, varlen_attention


@dataclass(frozen=True)
class MtpInput:
    """How the multi-token-prediction layer is fed; the defaults are those of the released models.

    `is_embedding_first`: `mtp.fc` reads [embedding | hidden state], not the other way round.
    `is_after_final_norm`: the hidden state is the one the head reads, not the one before it.
    """

    is_embedding_first: bool = True
    is_after_final_norm: bool = True


@dataclass(frozen=True)
class PackedHidden:
    """Hidden states `[T, D]` before and after the final norm; the head reads the latter."""

    before_norm_TD: torch.Tensor
    after_norm_TD: torch.Tensor


@dataclass(frozen=True)
class _Packing:
    bounds: tuple[int, ...]
    positions_T: torch.Tensor  # int32, from 0 in each document
    rotary: tuple[torch.Tensor, torch.Tensor]


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(list(ATTENTION_OPERATORS))


class PackedModel:
    """Forward pass over packed documents, differentiable in the adapter that `linear` adds.

    Weights that require gradients themselves receive them too: that is how the demo model
    is trained from scratch. The last `num_kept_layers` layers keep what their backward pass needs
    (None: all do); the others keep their input and compute the rest again.
    """

    def __init__(self, config: ModelConfig, weights: Weights, num_kept_layers: int | None = None) -> None:
        self.config = config
        self.weights = weights
        self.num_kept_layers = num_kept_layers
        self._base_linear = base_linear(weights)

    @property
    def head_weight(self) -> torch.Tensor:
        """The `[vocabulary, D]` matrix that turns hidden states into logits."""
        return head_weight(self.config, self.weights)

    def hidden_states(
        self, token_ids_T: torch.Tensor, cu_seqlens: Sequence[int], linear: LinearFn | None = None
    ) -> torch.Tensor:
        """Hidden states `[T, D]` after the final norm, ready for the head."""
        return self.forward(token_ids_T, cu_seqlens, linear).after_norm_TD

    def forward(
        self, token_ids_T: torch.Tensor, cu_seqlens: Sequence[int], linear: LinearFn | None = None
    ) -> PackedHidden:
        """Run all layers; `linear=None` is the bare base model.

        Raises:
            ShapeMismatch: the boundaries do not rise from 0 to T.
        """
        packing = self._packing(cu_seqlens, token_ids_T)
        linear = linear or self._base_linear
        hidden = embed(self.weights, token_ids_T)
        for index, kind in enumerate(self.config.layer_types):
            run = self._layer_again if self._is_computed_again(index) else self._layer
            hidden = run(f"model.layers.{index}", kind, hidden, packing, linear)
        return PackedHidden(hidden, decoder_norm(self.config, self.weights, "model.norm", hidden))

    def layer_output(
        self, index: int, hidden_TD: torch.Tensor, cu_seqlens: Sequence[int], linear: LinearFn | None = None
    ) -> torch.Tensor:
        """Hidden states `[T, D]` behind layer `index`, of those in front of it."""
        packing = self._packing(cu_seqlens, hidden_TD)
        kind = self.config.layer_types[index]
        return self._layer(f"model.layers.{index}", kind, hidden_TD, packing, linear or self._base_linear)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """`[T, vocabulary]` for small vocabularies and tests; training uses `token_logprobs`."""
        return F.linear(hidden_TD, self.head_weight)

    def mtp_hidden_states(
        self,
        hidden: PackedHidden,
        token_ids_T: torch.Tensor,
        cu_seqlens: Sequence[int],
        mtp_input: MtpInput | None = None,
        linear: LinearFn | None = None,
    ) -> torch.Tensor:
        """Hidden states `[T, D]` of the multi-token-prediction layer, ready for the same head.

        Position t reads the main model's state at t and the embedding of token t + 1, and
        predicts token t + 2. A document's last position has no next token: what comes out
        there means nothing and must not be used. `linear=None` is the layer without an adapter.
        """
        mtp_input, linear = mtp_input or MtpInput(), linear or self._base_linear
        packing = self._packing(cu_seqlens, token_ids_T)
        next_ids = torch.cat((token_ids_T[1:], token_ids_T[:1]))
        carried = hidden.after_norm_TD if mtp_input.is_after_final_norm else hidden.before_norm_TD
        parts = [
            self._norm("mtp.pre_fc_norm_embedding", embed(self.weights, next_ids)),
            self._norm("mtp.pre_fc_norm_hidden", carried),
        ]
        if not mtp_input.is_embedding_first:
            parts.reverse()
        (state,) = linear(("mtp.fc",), torch.cat(parts, dim=-1))
        for index in range(self.config.num_mtp_layers):
            prefix = f"mtp.layers.{index}"
            state = self._layer(prefix, "full_attention", state, packing, linear)
        return self._norm("mtp.norm", state)

    def _norm(self, name: str, x_TD: torch.Tensor) -> torch.Tensor:
        return decoder_norm(self.config, self.weights, name, x_TD)

    def _packing(self, cu_seqlens: Sequence[int], tokens_T: torch.Tensor) -> _Packing:
        bounds = check_cu_seqlens([int(bound) for bound in cu_seqlens], tokens_T.shape[0])
        positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
        positions = positions.to(tokens_T.device, torch.int32)
        return _Packing(bounds, positions, rotary_tables(positions, self.config))

    def _is_computed_again(self, index: int) -> bool:
        num_kept = self.config.num_layers if self.num_kept_layers is None else self.num_kept_layers
        return torch.is_grad_enabled() and index < self.config.num_layers - num_kept

    def _layer_again(self, prefix: str, kind: str, *arguments: Any) -> torch.Tensor:
        """The layer, which backward computes again, all but its attention: that is dear and small."""
        keep = _keep_attention if kind == "full_attention" else noop_context_fn
        return checkpoint(  # type: ignore[no-any-return]
            self._layer,
            prefix,
            kind,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=keep,
        )

    def _layer(
        self, prefix: str, kind: str, hidden: torch.Tensor, packing: _Packing, linear: LinearFn
    ) -> torch.Tensor:
        mixer = self._deltanet if kind == "linear_attention" else self._attention
        x = input_norm(self.config, self.weights, prefix, hidden)
        mixed = mixer(prefix, x, packing, linear)
        normed, hidden = mlp_norm(self.config, self.weights, prefix, mixed, hidden)
        return hidden + mlp(prefix, normed, linear)

    def _attention(
        self, prefix: str, x_TD: torch.Tensor, packing: _Packing, linear: LinearFn
    ) -> torch.Tensor:
        inputs = project_attention(self.config, self.weights, prefix, x_TD, *packing.rotary, linear)
        scale = self.config.head_dim**-0.5
        out = varlen_attention(inputs.q_THD, inputs.k_ThD, inputs.v_ThD, packing.bounds, scale)
        return finish_attention(prefix, out, inputs.gate_THD, linear)

    def _deltanet(self, prefix: str, x_TD: torch.Tensor, packing: _Packing, linear: LinearFn) -> torch.Tensor:
        projected = project_deltanet(self.config, prefix, x_TD, linear)
        heads = delta_train_heads(
            projected.mixed_TC,
            conv_weight(self.weights, prefix),
            packing.positions_T,
            packing.bounds,
            num_key_heads=self.config.linear_num_key_heads,
            key_dim=self.config.linear_key_head_dim,
            value_dim=self.config.linear_value_head_dim,
        )
        g, beta = delta_gates(self.weights, prefix, projected.a_TH, projected.b_TH)
        out_THV = delta_train(*heads, g, beta, packing.bounds)
        return finish_deltanet(self.config, self.weights, prefix, out_THV, projected.z_THV, linear)
