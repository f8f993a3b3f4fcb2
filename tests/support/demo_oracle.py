"""What the demo model says of an answer's tokens, in plain float32 and without an engine.

Legend: `T` tokens of prompt and answer, `N` of the answer, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kiln_engine.domain.plan import RowSampling
from kiln_engine.domain.request import SamplingParams
from kiln_engine.execution.draws import uniform_draw
from kiln_engine.execution.logit_edits import logit_edits
from kiln_gateway.rollouts import Rollout
from kiln_nn.config import ModelConfig
from kiln_nn.packed_model import PackedModel
from kiln_nn.weights.names import EMBEDDING
from tests.support.demo_serving import DEMO_MODEL
from tests.support.sampling_cases import Rule, expected, misplaced_mass
from tests.support.tiny_models import read_tensors

_PARAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True)
class TokenCheck:
    """How far an engine was from the oracle at one token of its answer."""

    # Log-probabilities, the engine's less the oracle's: at temperature 1, and of what it was drawn from.
    raw_difference: float
    sampled_difference: float
    # Of the distribution, between the seed's number and the token; 0 where it is the oracle's own draw. Of a
    # greedy answer how far the token's logit is below the best.
    misplaced: float
    is_certain: bool  # the engine had no other token to draw
    is_cut_off: bool  # the oracle could not have drawn it; there is no difference then


class DemoOracle:
    """Computes whole sequences at once: no cache, no state, no batch, no chunks."""

    def __init__(self) -> None:
        weights = {name: tensor.float() for name, tensor in read_tensors(DEMO_MODEL).items()}
        self._model = PackedModel(ModelConfig.from_folder(DEMO_MODEL), weights)
        self._head_VD = weights[EMBEDDING]

    @torch.no_grad()
    def logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
        """Those that each token of the answer was drawn from, `[N, V]`."""
        token_ids_T = torch.tensor([*prompt_ids, *answer_ids])
        hidden_TD = self._model.hidden_states(token_ids_T, (0, len(token_ids_T)))
        return (hidden_TD[len(prompt_ids) - 1 : -1] @ self._head_VD.T).float()

    def check(self, rollout: Rollout) -> list[TokenCheck]:
        """One entry a token of the answer; what a grammar or a budget forbids is not known here."""
        logits_NV = self.logits(rollout.prompt_token_ids, rollout.completion_token_ids)
        params = SamplingParams(**{name: getattr(rollout.sampling, name) for name in _PARAMS})
        return [self._check_token(rollout, params, logits_NV[n], n) for n in range(len(logits_NV))]

    def _check_token(
        self, rollout: Rollout, params: SamplingParams, logits_V: torch.Tensor, index: int
    ) -> TokenCheck:
        token = rollout.completion_token_ids[index]
        drawn = tuple(rollout.completion_token_ids[:index])
        history = RowSampling(params, index, tuple(rollout.prompt_token_ids), drawn)
        edits = tuple(logit_edits(history)) if params.needs_history else ()
        cut: Mapping[str, Any] = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        uniform = uniform_draw(rollout.sampling.seed, index)
        row = expected(logits_V, Rule(params.temperature, uniform, edits=edits, **cut))
        if params.temperature == 0:
            probability, misplaced = 1.0, row.best_logit - float(row.edited_V[token])
        else:
            probability, misplaced = float(row.probabilities_V[token]), misplaced_mass(token, row, uniform)
        return TokenCheck(
            rollout.logprobs[index] - float(row.raw_logprobs_V[token]),
            rollout.sampled_logprobs[index] - math.log(probability) if probability else 0.0,
            misplaced,
            is_certain=rollout.sampled_logprobs[index] == 0.0,
            is_cut_off=probability == 0.0,
        )
