"""On-policy distillation: the student writes, the teacher says how it would have gone on.

At each token of a completion that the student drew, its distribution over the vocabulary is pulled
towards the teacher's: all of it where the teacher runs on the same weights, its likeliest tokens and one
place for all others where it runs on another engine. The gradient goes through the distributions alone
and not through the drawing, as in the paper. A step's loss is the mean over its completion tokens.

Paper: Agarwal et al. 2023, On-policy distillation of language models, GKD (arXiv 2306.13649).
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.data.documents import Document, PreparedJob, TeacherTop
from kiln_trainer.recipes.errors import NoTrainableTokens
from kiln_trainer.recipes.opd_options import DistillationObjective, OpdOptions


@dataclass(frozen=True)
class Draw:
    """One completion to sample: which prompt of the job, and with which seed."""

    prompt_index: int
    seed: int


def plan_draws(
    num_prompts: int, options: OpdOptions, *, epochs: int, seed: int
) -> tuple[tuple[Draw, ...], ...]:
    """For every optimiser step the completions it learns from.

    Every epoch goes once through all prompts in an order of its own. What is drawn depends on the
    settings and the seed alone, so that a resumed job draws what it would have drawn.
    """
    steps = []
    for epoch in range(epochs):
        order = list(range(num_prompts))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        for start in range(0, num_prompts, options.prompts_per_step):
            chosen = order[start : start + options.prompts_per_step]
            steps.append(
                tuple(
                    Draw(index, _seed_of(seed, epoch, index, sample))
                    for index in chosen
                    for sample in range(options.samples_per_prompt)
                )
            )
    return tuple(steps)


def prepare_opd(
    rollouts: Sequence[trainer_pb2.OpdRollout],
    objective: DistillationObjective,
    tops: Sequence[TeacherTop] | None = None,
) -> PreparedJob:
    """Turn completions into documents; empty ones are left out.

    `tops`: for each completion what a teacher on another engine said; None where the teacher is here.

    Raises:
        NoTrainableTokens: every completion is empty.
    """
    judged = zip(rollouts, tops if tops is not None else [None] * len(rollouts), strict=True)
    documents = tuple(_document(rollout, top) for rollout, top in judged if rollout.completion_token_ids)
    if not documents:
        raise NoTrainableTokens(f"none of {len(rollouts)} completions has a token")
    facts = {
        "num_rollouts": float(len(documents)),
        "num_rollouts_truncated": float(sum(rollout.is_truncated for rollout in rollouts)),
        "completion_tokens_mean": statistics.fmean(document.num_scored for document in documents),
    }
    return PreparedJob(documents, objective, facts)


def _document(rollout: trainer_pb2.OpdRollout, top: TeacherTop | None) -> Document:
    num_prompt, num_scored = len(rollout.prompt_token_ids), len(rollout.completion_token_ids)
    ones_s = torch.ones(num_scored)
    logprobs = list(rollout.logprobs) or [math.nan] * num_scored
    return Document(
        token_ids_n=torch.tensor([*rollout.prompt_token_ids, *rollout.completion_token_ids]),
        scored_s=torch.arange(num_prompt, num_prompt + num_scored),
        ce_weight_s=0 * ones_s,
        policy_weight_s=ones_s,
        advantage_s=0 * ones_s,
        sampler_logprob_s=torch.tensor(logprobs, dtype=torch.float32),
        temperature=1.0,
        normaliser=float(num_scored),
        teacher_top=top,
    )


def _seed_of(seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}:{epoch}:{prompt_index}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
