"""The model with the adapter that learns: log-probabilities of a packed batch's targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kiln_nn.kernels.logprobs import TokenLogprobs, token_logprobs
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import PackedBatch, first_fit, pack
from kiln_trainer.torch_backend.activation_memory import ActivationPlan


class Policy:
    """A frozen base model and the adapter on it; the reference policy is the same model without.

    Only the rows that predict a scored token go through the head, so a prompt costs no logits.
    Without a plan every layer keeps its activations.
    """

    def __init__(
        self,
        model: PackedModel,
        lora: LoraParameters,
        device: torch.device,
        plan: ActivationPlan | None = None,
    ) -> None:
        self.model = model
        self.lora = lora
        self.device = device
        self._plan = plan
        self._adapted = lora.linear_fn(model.weights)

    def score(self, batch: PackedBatch, *, with_adapter: bool = True) -> TokenLogprobs:
        """Log-probability and entropy of each scored token at its document's temperature.

        `batch` must be on the policy's device.
        """
        if self._plan is not None:
            self.model.num_kept_layers = self._plan.num_kept_layers(batch.token_ids_T.shape[0])
        hidden_TD = self.model.hidden_states(
            batch.token_ids_T, batch.cu_seqlens, self._adapted if with_adapter else None
        )
        hidden_SD = hidden_TD.index_select(0, batch.rows_S)
        return token_logprobs(
            hidden_SD, self.model.head_weight, batch.targets_S, temperature=batch.temperature_S
        )

    @torch.no_grad()
    def logprobs_of(
        self,
        documents: Sequence[Document],
        indices: Sequence[int],
        *,
        batch_tokens: int,
        with_adapter: bool,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each chosen document's index and log-probabilities [s], on the CPU, without gradients.

        Packed in the order of `indices`, so the same call gives the same bits on the CPU.
        """
        lengths = [document.num_tokens for document in documents]
        for chosen in first_fit(indices, lengths, batch_tokens):
            batch = pack([documents[index] for index in chosen]).to(self.device)
            scored = self.score(batch, with_adapter=with_adapter).logprobs_T.cpu()
            sizes = [documents[index].num_scored for index in chosen]
            yield from zip(chosen, scored.split(sizes), strict=True)
