"""The policy losses as their papers write them, token by token in float64: what the recipes must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch


@dataclass
class Completion:
    """One completion and what three policies think of its tokens."""

    reward: float
    sampler: list[float]  # empty: unknown
    old: list[float]
    reference: list[float]
    now: list[torch.Tensor]
    is_truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.old)


def expected_loss(
    groups: list[list[Completion]], loss: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The papers' formulas, in loops."""
    every_reward = [c.reward for group in groups for c in group]
    chosen = []
    for group in groups:
        rewards = [c.reward for c in group]
        if len(set(rewards)) == 1:
            continue
        for completion in group:
            advantage = completion.reward - fmean(rewards)
            if loss["scale_rewards"] == "group":
                advantage /= pstdev(rewards) + 1e-4
            elif loss["scale_rewards"] == "batch":
                advantage /= pstdev(every_reward) + 1e-4
            if not (loss["mask_truncated_completions"] and completion.is_truncated):
                chosen.append((completion, advantage))
    num_tokens = sum(c.num_tokens for c, _ in chosen)
    longest = max(c.num_tokens for c, _ in chosen)
    total = torch.zeros((), dtype=torch.float64)
    num_low = num_high = 0
    for completion, advantage in chosen:
        token_losses, num_clipped = losses_of(completion, advantage, loss)
        num_low, num_high = num_low + num_clipped[0], num_high + num_clipped[1]
        for token_loss in token_losses:
            match loss["type"]:
                case "grpo" | "gspo":
                    total = total + token_loss / completion.num_tokens / len(chosen)
                case "dr_grpo":
                    total = total + token_loss / longest / len(chosen)
                case "dapo" | "cispo":
                    total = total + token_loss / num_tokens
    return total, {"clip_fraction_low": num_low / num_tokens, "clip_fraction_high": num_high / num_tokens}


def losses_of(
    completion: Completion, advantage: float, loss: dict[str, Any]
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    low, high = 1 - loss["clip_low"], 1 + loss["clip_high"]
    uses_sampler = loss["importance_mode"] == "none" and completion.sampler
    behaviour = completion.sampler if uses_sampler else completion.old
    log_ratios = [now - before for now, before in zip(completion.now, behaviour, strict=True)]
    if loss["type"] == "gspo":
        log_ratios = [sum(log_ratios) / len(log_ratios)] * len(log_ratios)
    weights = correction(completion, loss)
    found, num_low, num_high = [], 0, 0
    for log_ratio, now, reference, weight in zip(
        log_ratios, completion.now, completion.reference, weights, strict=True
    ):
        ratio = log_ratio.exp()
        is_low, is_high = ratio.item() < low, ratio.item() > high
        bounded = min(max(ratio.item(), low), high)
        if loss["type"] == "cispo":
            gain = bounded * advantage * now
        else:
            is_low, is_high = is_low and advantage < 0, is_high and advantage > 0
            gain = torch.tensor(bounded * advantage) if is_low or is_high else ratio * advantage
        num_low, num_high = num_low + is_low, num_high + is_high
        found.append(-weight * gain + loss["kl_coef"] * penalty(now, reference, loss["kl_estimator"]))
    return found, (num_low, num_high)


def correction(completion: Completion, loss: dict[str, Any]) -> list[float]:
    if loss["importance_mode"] == "none" or not completion.sampler:
        return [1.0] * completion.num_tokens
    ratios = [math.exp(old - drawn) for old, drawn in zip(completion.old, completion.sampler, strict=True)]
    if loss["importance_mode"] == "sequence":
        ratios = [math.prod(ratios)] * len(ratios)
    return [min(ratio, loss["importance_cap"]) for ratio in ratios]


def penalty(now: torch.Tensor, reference: float, estimator: str) -> torch.Tensor:
    if estimator == "k1":  # the score function's gradient: the estimate times that of log p
        estimate = now.item() - reference
        return estimate + estimate * (now - now.item())
    if estimator == "k2":
        return (now - reference) ** 2 / 2
    return (reference - now).exp() - 1 - (reference - now)
