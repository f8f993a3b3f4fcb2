"""How much better each completion is than the others of its group, and which of them count.

Papers: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), GRPO; Liu et al. 2025, Understanding
R1-Zero-like training (arXiv 2503.20783), why one may leave the division by the deviation out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kiln_common.pb import trainer_pb2
from kiln_trainer.recipes.options import RewardScale

_EPS = 1e-4  # keeps a nearly constant group from being blown up into large advantages
_SAME = 1e-9  # rewards closer than this, relative to their size, count as equal


def is_constant(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are all equal up to rounding: it says nothing about its samples."""
    size = max(1.0, *(abs(reward) for reward in rewards))
    return max(rewards) - min(rewards) <= _SAME * size


def is_learned_from(rollout: trainer_pb2.GrpoRollout, *, masks_truncated: bool) -> bool:
    """Whether a completion of a group with different rewards has tokens to learn from.

    Masking completions that ran into their limit: DAPO (arXiv 2503.14476), overlong filtering. What
    they would have been worth is unknown, so a low reward teaches brevity by accident.
    """
    return bool(rollout.completion_token_ids) and not (masks_truncated and rollout.is_truncated)


def group_advantages(groups: Sequence[Sequence[float]], scale: RewardScale) -> list[list[float]]:
    """Each reward less its group's mean, over a population standard deviation.

    `scale`: "group" divides by the group's own deviation, "batch" by that of all rewards
    together, "none" not at all.
    """
    batch_deviation = statistics.pstdev([reward for group in groups for reward in group])
    advantages = []
    for rewards in groups:
        mean = statistics.fmean(rewards)
        if scale == "none":
            divisor = 1.0
        else:
            divisor = _EPS + (statistics.pstdev(rewards) if scale == "group" else batch_deviation)
        advantages.append([(reward - mean) / divisor for reward in rewards])
    return advantages
