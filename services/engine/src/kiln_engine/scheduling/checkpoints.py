"""Where along a prompt a state checkpoint pays for its slot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Page boundaries, in tokens from the start, ascending."""

    # Worth evicting an older checkpoint for.
    wanted: tuple[int, ...]
    # Made only while a slot is free.
    optional: tuple[int, ...]


def stable_boundary(num_prompt_tokens: int, num_stable_tokens: int, page_tokens: int) -> int:
    """The last page boundary that later requests of the conversation share, 0 for none.

    Without a hint it is the last boundary strictly before the prompt's end, so that the same or a
    longer prompt hits with at least one token left to compute.
    """
    end = num_stable_tokens if num_stable_tokens > 0 else num_prompt_tokens - 1
    return min(end, num_prompt_tokens) // page_tokens * page_tokens


def plan_checkpoints(
    *,
    num_prompt_tokens: int,
    num_stable_tokens: int,
    num_hit_tokens: int,
    branch_points: tuple[int, ...],
    page_tokens: int,
    interval_tokens: int,
) -> CheckpointPlan:
    """Checkpoints for the part of a prompt after its hit.

    `branch_points` are boundaries where this prompt is known to part from another one.
    """
    stable = stable_boundary(num_prompt_tokens, num_stable_tokens, page_tokens)
    wanted = {b for b in (*branch_points, stable) if num_hit_tokens < b <= num_prompt_tokens}
    interval = max(interval_tokens // page_tokens, 1) * page_tokens
    first = (num_hit_tokens // interval + 1) * interval
    optional = set(range(first, num_prompt_tokens + 1, interval)) - wanted
    return CheckpointPlan(tuple(sorted(wanted)), tuple(sorted(optional)))


def is_turn_end_useful(num_prompt_tokens: int, num_stable_tokens: int) -> bool:
    """Whether a later request can match beyond this prompt into its answer.

    The client says so by calling the whole prompt stable; without a hint it may.
    """
    return num_stable_tokens == 0 or num_stable_tokens >= num_prompt_tokens
