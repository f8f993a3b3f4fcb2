"""A document: token ids and, for each scored token, what the step function needs to know of it.

Legend: `n` tokens of one document, `s` its scored tokens, `K` likeliest tokens of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kiln_trainer.recipes.opd_options import Objective


@dataclass(frozen=True)
class TeacherTop:
    """A teacher's K likeliest tokens at each scored token, and their log-probabilities among all."""

    ids_sK: torch.Tensor
    logprobs_sK: torch.Tensor


@dataclass(frozen=True)
class Document:
    """One sequence of tokens with its per-token streams, all on the CPU.

    `scored_s` are the positions (1 to n-1, rising) of the tokens that are learned from; the other
    streams run along it. A job's loss is

        sum of ce_weight * cross_entropy + policy_weight * objective, over the step's tokens,
        divided by the sum of `normaliser` over the step's documents

    where the objective is a policy loss or a divergence from a teacher.

    `sampler_logprob_s` is the sampler's log-probability at `temperature`, NaN where it is unknown.
    `teacher_top` is there where a teacher on another engine has judged the document.
    """

    token_ids_n: torch.Tensor
    scored_s: torch.Tensor
    ce_weight_s: torch.Tensor
    policy_weight_s: torch.Tensor
    advantage_s: torch.Tensor
    sampler_logprob_s: torch.Tensor
    temperature: float
    normaliser: float
    teacher_top: TeacherTop | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids_n.shape[0]

    @property
    def num_scored(self) -> int:
        return self.scored_s.shape[0]

    @property
    def num_drafted(self) -> int:
        """Scored tokens that a draft could have foreseen: those with two tokens before them."""
        return int((self.scored_s >= 2).sum())

    @property
    def is_sampled(self) -> bool:
        """Whether the sampler's log-probabilities are known (they are for all tokens or none)."""
        return not bool(self.sampler_logprob_s.isnan().any())


@dataclass(frozen=True)
class PreparedJob:
    """What a recipe makes of a request.

    `objective` is None where no document has a policy weight. `facts` are numbers about the data
    that do not change from step to step; they are reported with every step's metrics.
    """

    documents: tuple[Document, ...]
    objective: Objective | None
    facts: Mapping[str, float]
