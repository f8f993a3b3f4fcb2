"""The multi-token-prediction layer in its packed form over one document: what engines' drafts are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kiln_engine.domain import RowSampling
from kiln_engine.execution.sampler import sample
from kiln_engine.model.mtp_layer import MtpHidden
from kiln_nn.config import ModelConfig
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import MtpInput, PackedHidden, PackedModel
from tests.support.tiny_models import read_tensors
from tests.support.variants import on_the_schemes_numbers


class PackedMtp:
    """The checkpoint's model and layer in a format, with adapters (and their strengths) merged into the weights."""

    def __init__(
        self,
        folder: Path,
        hidden: MtpHidden = "normed",
        *,
        adapters: Sequence[tuple[LoraParameters, float]] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Of a trained checkpoint too it has the weights that a quantised engine has.
        held = on_the_schemes_numbers({name: tensor.float() for name, tensor in read_tensors(folder).items()})
        weights = {name: tensor.double() for name, tensor in held.items()}
        for lora, scale in adapters:
            for path, (a, b) in lora.tensors().items():
                weights[f"{path}.weight"] += scale * lora.spec.scaling * b.double() @ a.double()
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.model = PackedModel(ModelConfig.from_folder(folder), weights)
        self._is_normed = hidden == "normed"

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """The main model's states that the layer reads, `[T, D]`."""
        with torch.no_grad():
            hidden = self.model.forward(torch.tensor(tokens), (0, len(tokens)))
        return hidden.after_norm_TD if self._is_normed else hidden.before_norm_TD

    def states(self, tokens: Sequence[int], hidden_TD: torch.Tensor) -> torch.Tensor:
        """The layer's normed states, fed with these hidden states: entry i of them is at i - 1."""
        fed = PackedHidden(hidden_TD, hidden_TD)
        with torch.no_grad():
            return self.model.mtp_hidden_states(
                fed, torch.tensor(tokens), (0, len(tokens)), MtpInput(is_after_final_norm=self._is_normed)
            )

    def drafts(
        self,
        tokens: Sequence[int],
        count: int,
        samplings: Sequence[RowSampling] = (),
        hidden_TD: torch.Tensor | None = None,
    ) -> list[int]:
        """The drafts after `tokens`, each fed back with the layer's own normed state.

        The likeliest ones, unless `samplings` says how each is drawn. `hidden_TD` are the main model's states
        for these tokens and maybe more, where they are known.
        """
        assert self._is_normed
        known = list(tokens)
        hidden_TD = (self.hidden(tokens) if hidden_TD is None else hidden_TD)[: len(known) - 1]
        for number in range(count):
            # The newest token has no hidden state yet; nothing depends on what stands there.
            fed = torch.cat((hidden_TD, torch.zeros_like(hidden_TD[:1])))
            states_TD = self.states(known, fed)
            logits_V = self.model.logits(states_TD[len(known) - 2]).float()
            if samplings:
                drawn = sample(logits_V[None], [samplings[number]]).wait()[0].token_id
            else:
                drawn = int(logits_V.argmax())
            known.append(drawn)
            hidden_TD = torch.cat((hidden_TD, states_TD[None, len(known) - 3]))
        return known[len(tokens) :]
