"""The model with the adapter that learns: log-probabilities of a packed batch's targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kiln_nn.kernels.divergence import TokenDivergences, token_divergences, top_k_divergences
from kiln_nn.kernels.logprobs import TokenLogprobs, token_logprobs
from kiln_nn.lora.dropout import LoraDropout
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import PackedBatch, first_fit, pack
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.torch_backend.activation_memory import ActivationPlan


class Policy:
    """A frozen base model and the adapter on it; the reference policy is the same model without.

    Only the rows that predict a scored token go through the head, so a prompt costs no logits.
    The teacher is the same model too, with the adapter `teacher` or without any, unless a batch says what
    another one thinks of it. Without a plan
    every layer keeps its activations.
    """

    def __init__(
        self,
        model: PackedModel,
        lora: LoraParameters,
        device: torch.device,
        plan: ActivationPlan | None = None,
        teacher: LoraParameters | None = None,
        dropout: LoraDropout | None = None,
    ) -> None:
        self.model = model
        self.lora = lora
        self.device = device
        self._plan = plan
        self._adapted = lora.linear_fn(model.weights, dropout)
        self._teacher = teacher.linear_fn(model.weights) if teacher is not None else None

    def score(self, batch: PackedBatch, *, with_adapter: bool = True) -> TokenLogprobs:
        """Log-probability and entropy of each scored token at its document's temperature.

        `batch` must be on the policy's device.
        """
        self._plan_activations(batch)
        hidden_TD = self.model.hidden_states(
            batch.token_ids_T, batch.cu_seqlens, self._adapted if with_adapter else None
        )
        hidden_SD = hidden_TD.index_select(0, batch.rows_S)
        return token_logprobs(
            hidden_SD, self.model.head_weight, batch.targets_S, temperature=batch.temperature_S
        )

    def compare(self, batch: PackedBatch, objective: DistillationObjective) -> TokenDivergences:
        """How far each scored token's distribution is from the teacher's.

        Over the teacher's likeliest tokens and one place for all others where the batch has them, else
        over the whole vocabulary. `batch` must be on the policy's device.
        """
        if batch.teacher_ids_SK is not None and batch.teacher_logprobs_SK is not None:
            return self._compare_to_top(batch, batch.teacher_ids_SK, batch.teacher_logprobs_SK, objective)
        with torch.no_grad():
            teacher_TD = self.model.hidden_states(batch.token_ids_T, batch.cu_seqlens, self._teacher)
            teacher_SD = teacher_TD[batch.rows_S]
            del teacher_TD
        self._plan_activations(batch)
        student_TD = self.model.hidden_states(batch.token_ids_T, batch.cu_seqlens, self._adapted)
        return token_divergences(
            student_TD[batch.rows_S],
            teacher_SD,
            self.model.head_weight,
            batch.targets_S,
            objective.divergence,
            beta=objective.beta,
        )

    def _compare_to_top(
        self,
        batch: PackedBatch,
        ids_SK: torch.Tensor,
        logprobs_SK: torch.Tensor,
        objective: DistillationObjective,
    ) -> TokenDivergences:
        self._plan_activations(batch)
        student_TD = self.model.hidden_states(batch.token_ids_T, batch.cu_seqlens, self._adapted)
        return top_k_divergences(
            student_TD[batch.rows_S],
            ids_SK,
            logprobs_SK,
            self.model.head_weight,
            batch.targets_S,
            objective.divergence,
            beta=objective.beta,
        )

    def _plan_activations(self, batch: PackedBatch) -> None:
        if self._plan is not None:
            self.model.num_kept_layers = self._plan.num_kept_layers(batch.token_ids_T.shape[0])

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
