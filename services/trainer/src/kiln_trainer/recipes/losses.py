"""The loss of each scored token, from its log-probability and its streams.

Three policies meet in a policy token: the *sampler* that drew it (the engine, in its arithmetic),
*old*, the trainer's policy when the job began, and the current one. What a token's loss weighs,
which is where the losses differ as well, is decided in recipes/grpo.py.

Legend: `S` scored tokens of a micro-batch.

Papers: those of each loss below; Schulman 2020, "Approximating KL divergence", k1 to k3; Yao et
al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", the truncated
correction between sampler and trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_trainer.data.packing import PackedBatch
from kiln_trainer.recipes.options import KlEstimator, PolicyObjective

_MAX_LOG_RATIO = 20.0  # e^20 is far outside every clip range, and its square is still finite


@dataclass(frozen=True)
class PolicyLosses:
    """Per scored token: the loss, and what is worth knowing about it (all but loss_S detached).

    `old_logprob_S` has the gaps of the batch's stream filled where they could be, `kl_S` is zero
    without a reference, `mismatch_S` (the k3 estimate of KL(sampler || trainer)) is NaN where
    sampler or old policy is unknown.
    """

    loss_S: torch.Tensor
    old_logprob_S: torch.Tensor
    ratio_S: torch.Tensor
    is_clipped_low_S: torch.Tensor
    is_clipped_high_S: torch.Tensor
    importance_S: torch.Tensor
    kl_S: torch.Tensor
    mismatch_S: torch.Tensor


def cross_entropy(logprob_S: torch.Tensor) -> torch.Tensor:
    """Surprise at each target."""
    return -logprob_S


def policy_losses(
    logprob_S: torch.Tensor, batch: PackedBatch, objective: PolicyObjective, *, is_first_step: bool
) -> PolicyLosses:
    """The policy loss with its correction and its pull towards the reference.

    The ratio's denominator is the sampler's log-probability where it is known and importance_mode
    is "none"; otherwise the old policy's, and the distance from the sampler to it becomes a
    weight of at most importance_cap.

    `is_first_step`: nothing was updated yet, so the current policy is the old one.
    """
    now_S = logprob_S.detach()
    old_S, sampler_S = batch.old_logprob_S, batch.sampler_logprob_S
    if is_first_step:
        old_S = torch.where(old_S.isnan(), now_S, old_S)
    if objective.importance_mode == "none":
        behaviour_S = torch.where(sampler_S.isnan(), old_S, sampler_S)
    else:
        behaviour_S = old_S
    log_ratio_S = logprob_S - behaviour_S
    if objective.loss_type == "gspo":
        log_ratio_S = mean_of_completion(log_ratio_S, batch)
    ratio_S = log_ratio_S.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    is_low_S, is_high_S = ratio_S < 1 - objective.clip_low, ratio_S > 1 + objective.clip_high
    if objective.loss_type == "cispo":
        gain_S = cispo_gain(logprob_S, ratio_S, batch.advantage_S, objective)
    else:
        gain_S = clipped_gain(ratio_S, batch.advantage_S, objective)
        is_low_S, is_high_S = is_low_S & (batch.advantage_S < 0), is_high_S & (batch.advantage_S > 0)
    importance_S = importance_weights(old_S - sampler_S, batch, objective)
    loss_S = -importance_S * gain_S
    kl_S = torch.zeros_like(now_S)
    if objective.kl_coef:
        penalty_S, kl_S = kl_penalty(logprob_S, batch.reference_logprob_S, objective.kl_estimator)
        loss_S = loss_S + objective.kl_coef * penalty_S
    mismatch_S = k3_estimate(old_S - sampler_S)
    return PolicyLosses(loss_S, old_S, ratio_S.detach(), is_low_S, is_high_S, importance_S, kl_S, mismatch_S)


def k3_estimate(log_ratio_S: torch.Tensor) -> torch.Tensor:
    """k3 of KL(q || p) at tokens drawn from q, from log p - log q; finite, and NaN where that is NaN."""
    distance_S = log_ratio_S.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return distance_S.expm1() - distance_S


def clipped_gain(
    ratio_S: torch.Tensor, advantage_S: torch.Tensor, objective: PolicyObjective
) -> torch.Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A): a ratio past its bound gains nothing more.

    Papers: Schulman et al. 2017, PPO (arXiv 1707.06347), and with it GRPO (Shao et al. 2024, arXiv
    2402.03300) and Dr. GRPO (Liu et al. 2025, arXiv 2503.20783); two different bounds, the upper
    one wider: Yu et al. 2025, DAPO (arXiv 2503.14476).
    """
    clipped_S = ratio_S.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    return torch.minimum(ratio_S * advantage_S, clipped_S * advantage_S)


def mean_of_completion(log_ratio_S: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Each token's log-ratio replaced by the mean of its completion's: one ratio for all of it.

    The ratio is the geometric mean of the tokens' own, (pi(y) / pi_old(y)) to the power 1 / |y|.
    Rewards are for completions, so whole completions are weighed and clipped.

    Paper: Zheng et al. 2025, Group sequence policy optimization, GSPO (arXiv 2507.18071).
    """
    per_document = log_ratio_S.new_zeros(batch.num_documents)
    sums = per_document.index_add(0, batch.document_S, log_ratio_S)
    counts = per_document.index_add(0, batch.document_S, torch.ones_like(log_ratio_S))
    return (sums / counts)[batch.document_S]


def cispo_gain(
    logprob_S: torch.Tensor, ratio_S: torch.Tensor, advantage_S: torch.Tensor, objective: PolicyObjective
) -> torch.Tensor:
    """REINFORCE weighed by the clipped ratio, which has no gradient: every token goes on learning.

    Paper: MiniMax 2025, MiniMax-M1, CISPO (arXiv 2506.13585).
    """
    weight_S = ratio_S.detach().clamp(1 - objective.clip_low, 1 + objective.clip_high)
    return weight_S * advantage_S * logprob_S


def importance_weights(
    log_ratio_S: torch.Tensor, batch: PackedBatch, objective: PolicyObjective
) -> torch.Tensor:
    """How much more likely the old policy draws each token (or its whole completion) than the sampler.

    Truncated importance sampling: Ionides 2008; between an inference engine and its trainer: Yao et
    al. 2025.

    `log_ratio_S` is old - sampler, NaN where either is unknown, which weighs 1. Cut off at
    `importance_cap`: an unbounded weight has an unbounded variance.
    """
    if objective.importance_mode == "none":
        return torch.ones_like(log_ratio_S)
    log_ratio_S = log_ratio_S.nan_to_num(nan=0.0)
    if objective.importance_mode == "sequence":
        per_document = log_ratio_S.new_zeros(batch.num_documents)
        log_ratio_S = per_document.index_add(0, batch.document_S, log_ratio_S)[batch.document_S]
    return log_ratio_S.clamp(max=_MAX_LOG_RATIO).exp().clamp(max=objective.importance_cap)


def kl_penalty(
    logprob_S: torch.Tensor, reference_S: torch.Tensor, estimator: KlEstimator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to minimise, and the (detached) estimate of KL(policy || reference) it stands for.

    k1 is the plain difference. Its own gradient vanishes in expectation, so it is taken through
    the choice of the token instead: the estimate times the gradient of its log-probability.
    """
    distance_S = (reference_S - logprob_S).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        estimate_S = -distance_S.detach()
        return estimate_S * (1 + logprob_S - logprob_S.detach()), estimate_S
    penalty_S = distance_S.square() / 2 if estimator == "k2" else k3_estimate(distance_S)
    return penalty_S, penalty_S.detach()
