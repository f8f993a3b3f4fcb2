"""Group-relative policy optimisation: raise what scored above its group's mean, lower the rest.

The losses differ in the ratio they clip (recipes/losses.py), in the defaults of their bounds
(recipes/options.py), and in what a token weighs, which `token_weight` says.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.data.documents import Document, PreparedJob
from kiln_trainer.domain.errors import NoLearningSignal
from kiln_trainer.recipes.advantages import group_advantages, is_constant, is_learned_from
from kiln_trainer.recipes.errors import InvalidTrainingData, NoTrainableTokens
from kiln_trainer.recipes.options import GrpoOptions, LossType


def prepare_grpo(spec: trainer_pb2.GrpoSpec) -> PreparedJob:
    """Turn scored rollouts into documents with advantages.

    Groups whose rewards are all equal are counted and left out. So are empty completions and, if
    the loss masks them, truncated ones; their rewards still count in their group's mean.

    Raises:
        NoLearningSignal: every group's rewards are equal.
        NoTrainableTokens: every completion that would count is empty or masked.
        InvalidTrainingData: a reward or log-probability is not finite, or lengths differ.
    """
    options = GrpoOptions.from_proto(spec.loss)
    _check(spec.groups)
    rewards = [[rollout.reward for rollout in group.rollouts] for group in spec.groups]
    advantages = group_advantages(rewards, options.scale_rewards)
    is_skipped = [is_constant(group) for group in rewards]
    if all(is_skipped):
        raise NoLearningSignal(f"the rewards in each of {len(rewards)} groups are equal")
    chosen = [
        (rollout, advantage)
        for group, group_adv, skip in zip(spec.groups, advantages, is_skipped, strict=True)
        for rollout, advantage in zip(group.rollouts, group_adv, strict=True)
        if not skip and is_learned_from(rollout, masks_truncated=options.masks_truncated)
    ]
    if not chosen:
        raise NoTrainableTokens("every completion of the groups with different rewards is empty or masked")
    longest = max(len(rollout.completion_token_ids) for rollout, _ in chosen)
    loss_type = options.objective.loss_type
    documents = [_document(rollout, advantage, loss_type, longest) for rollout, advantage in chosen]
    facts = _facts(spec.groups, [advantage for _, advantage in chosen], sum(is_skipped))
    if options.masks_truncated:
        facts["num_rollouts_masked"] = facts["num_rollouts_truncated"]
    return PreparedJob(tuple(documents), options.objective, facts)


def token_weight(loss_type: LossType, num_tokens: int, longest: int) -> tuple[float, float]:
    """What a token of a completion of `num_tokens` weighs, and what the completion adds to the divisor.

    A step's loss is the weighted sum over its tokens, divided by the sum of its completions' divisors.

    grpo, gspo: the mean of the completions' means, so every completion has the same say (DeepSeekMath,
    arXiv 2402.03300; GSPO, arXiv 2507.18071). dr_grpo: sums over a constant, the job's longest
    completion, so that long wrong answers are not spared (arXiv 2503.20783). dapo, cispo: the mean
    over all tokens of the step, so every token has the same say (arXiv 2503.14476, 2506.13585).
    """
    match loss_type:
        case "grpo" | "gspo":
            return 1 / num_tokens, 1.0
        case "dr_grpo":
            return 1 / longest, 1.0
        case "dapo" | "cispo":
            return 1.0, float(num_tokens)


def _document(
    rollout: trainer_pb2.GrpoRollout, advantage: float, loss_type: LossType, longest: int
) -> Document:
    num_prompt, num_scored = len(rollout.prompt_token_ids), len(rollout.completion_token_ids)
    ones_s = torch.ones(num_scored)
    sampler_logprobs = list(rollout.behaviour_logprobs) or [math.nan] * num_scored
    weight, normaliser = token_weight(loss_type, num_scored, longest)
    return Document(
        token_ids_n=torch.tensor([*rollout.prompt_token_ids, *rollout.completion_token_ids]),
        scored_s=torch.arange(num_prompt, num_prompt + num_scored),
        ce_weight_s=0 * ones_s,
        policy_weight_s=weight * ones_s,
        advantage_s=advantage * ones_s,
        sampler_logprob_s=torch.tensor(sampler_logprobs, dtype=torch.float32),
        temperature=rollout.temperature or 1.0,
        normaliser=normaliser,
    )


def _check(groups: Sequence[trainer_pb2.GrpoGroup]) -> None:
    if not groups:
        raise InvalidTrainingData("there are no groups")
    for number, group in enumerate(groups):
        if len(group.rollouts) < 2:
            raise InvalidTrainingData(
                f"group {number} has {len(group.rollouts)} rollouts",
                hint="A reward is judged against others of its group: give each group at least two.",
            )
        for index, rollout in enumerate(group.rollouts):
            _check_rollout(f"rollout {index} of group {number}", rollout)


def _check_rollout(name: str, rollout: trainer_pb2.GrpoRollout) -> None:
    num_known, num_scored = len(rollout.behaviour_logprobs), len(rollout.completion_token_ids)
    if not rollout.prompt_token_ids:
        raise InvalidTrainingData(f"{name} has no prompt tokens")
    if not math.isfinite(rollout.reward):
        raise InvalidTrainingData(f"{name} has the reward {rollout.reward}")
    if num_known not in (0, num_scored):
        raise InvalidTrainingData(f"{name} has {num_scored} tokens and {num_known} log-probabilities")
    if not all(math.isfinite(logprob) for logprob in rollout.behaviour_logprobs):
        raise InvalidTrainingData(f"{name} has a log-probability that is not finite")
    if not 0 <= rollout.temperature < math.inf:
        raise InvalidTrainingData(f"{name} has the temperature {rollout.temperature}")


def _facts(
    groups: Sequence[trainer_pb2.GrpoGroup], advantages: Sequence[float], num_skipped: int
) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts]
    sources = Counter(rollout.source or "token_ids" for rollout in rollouts)
    return {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "advantage_mean": statistics.fmean(advantages),
        "advantage_std": statistics.pstdev(advantages),
        "advantage_max": max(advantages),
        "advantage_min": min(advantages),
        "num_groups": float(len(groups)),
        "num_groups_skipped": float(num_skipped),
        "num_rollouts_retokenised": float(sources["retokenised"]),
        "num_rollouts_truncated": float(sum(rollout.is_truncated for rollout in rollouts)),
    }
