"""The model with the adapter that learns: log-probabilities of a packed batch's targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kiln_nn.kernels.divergence import TokenDivergences, token_divergences, top_k_divergences
from kiln_nn.kernels.logprobs import TokenLogprobs, token_logprobs
from kiln_nn.lora.dropout import LoraDropout
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedHidden, PackedModel
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import PackedBatch, first_fit, pack
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.torch_backend.activation_memory import ActivationPlan


class Policy:
    """A frozen base model and the adapter on it; the reference policy is the same model without.

    Only the rows that predict a scored token go through the head, so a prompt costs no logits.
    The teacher is the same model too, with the adapter `teacher` or without any, unless a batch says what
    another one thinks of it. Without a plan every layer keeps its activations.
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

    def run(self, batch: PackedBatch, *, with_adapter: bool = True) -> PackedHidden:
        """The model's hidden states of a batch, which must be on the policy's device."""
        self._plan_activations(batch)
        linear = self._adapted if with_adapter else None
        return self.model.forward(batch.token_ids_T, batch.cu_seqlens, linear)

    def score(self, batch: PackedBatch, hidden: PackedHidden) -> TokenLogprobs:
        """Log-probability and entropy of each scored token at its document's temperature."""
        hidden_SD = hidden.after_norm_TD.index_select(0, batch.rows_S)
        return token_logprobs(
            hidden_SD, self.model.head_weight, batch.targets_S, temperature=batch.temperature_S
        )

    @torch.no_grad()
    def teach(self, batch: PackedBatch) -> torch.Tensor | None:
        """The teacher's hidden states of the scored tokens; None where the batch says what it thinks of them."""
        if batch.teacher_ids_SK is not None:
            return None
        teacher_TD = self.model.hidden_states(batch.token_ids_T, batch.cu_seqlens, self._teacher)
        return teacher_TD[batch.rows_S]

    def compare(
        self,
        batch: PackedBatch,
        hidden: PackedHidden,
        teacher_SD: torch.Tensor | None,
        objective: DistillationObjective,
    ) -> TokenDivergences:
        """How far each scored token's distribution is from the teacher's, of what `teach` gave.

        Over the whole vocabulary, or over the teacher's likeliest tokens and one place for all others.
        """
        student_SD, head_VD = hidden.after_norm_TD[batch.rows_S], self.model.head_weight
        kind, beta = objective.divergence, objective.beta
        if teacher_SD is not None:
            return token_divergences(student_SD, teacher_SD, head_VD, batch.targets_S, kind, beta=beta)
        assert batch.teacher_ids_SK is not None
        assert batch.teacher_logprobs_SK is not None
        top = batch.teacher_ids_SK, batch.teacher_logprobs_SK
        return top_k_divergences(student_SD, *top, head_VD, batch.targets_S, kind, beta=beta)

    def draft(self, batch: PackedBatch, hidden: PackedHidden) -> TokenDivergences:
        """How far the multi-token-prediction layer's guesses are from the model's own distributions, [M].

        The guess of a token is made one token earlier, from the hidden state there and the token that
        followed. Gradients stop at both: what comes out moves the layer's own adapter alone.
        """
        detached = PackedHidden(hidden.before_norm_TD.detach(), hidden.after_norm_TD.detach())
        drafts_TD = self.model.mtp_hidden_states(
            detached, batch.token_ids_T, batch.cu_seqlens, linear=self._adapted
        )
        rows_M, targets_M = batch.rows_S[batch.drafted_M], batch.targets_S[batch.drafted_M]
        own_MD = detached.after_norm_TD[rows_M]
        return token_divergences(
            drafts_TD[rows_M - 1], own_MD, self.model.head_weight, targets_M, "forward_kl"
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
            scored = self.score(batch, self.run(batch, with_adapter=with_adapter)).logprobs_T.cpu()
            sizes = [documents[index].num_scored for index in chosen]
            yield from zip(chosen, scored.split(sizes), strict=True)
