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


# A boundary this close before the prompt's end stands in for the one at the end.
_MIN_GAIN_PAGES = 2


def prompt_boundaries(
    *, num_prompt_tokens: int, num_stable_tokens: int, num_shared_tokens: int, page_tokens: int
) -> set[int]:
    """Page boundaries of a prompt from which later requests are expected to go on.

    The last one within what the conversation's next request repeats, and within what other
    conversations share. Also the last one strictly before the prompt's end, unless the stable one is
    about as far: there the same prompt again, another choice of it, or one that only extends it (a
    tool's answer) starts, with at least one token left to compute.
    """
    stable, shared, last = (
        num_tokens // page_tokens * page_tokens
        for num_tokens in (num_stable_tokens, num_shared_tokens, num_prompt_tokens - 1)
    )
    boundaries = {stable, shared}
    if stable == 0 or not last - _MIN_GAIN_PAGES * page_tokens < stable <= last:
        boundaries.add(last)
    return boundaries - {0}


def plan_checkpoints(
    *,
    num_prompt_tokens: int,
    num_stable_tokens: int,
    num_shared_tokens: int,
    num_hit_tokens: int,
    branch_points: tuple[int, ...],
    page_tokens: int,
    interval_tokens: int,
) -> CheckpointPlan:
    """Checkpoints for the part of a prompt after its hit.

    `branch_points` are boundaries where this prompt is known to part from another one.
    """
    expected = prompt_boundaries(
        num_prompt_tokens=num_prompt_tokens,
        num_stable_tokens=num_stable_tokens,
        num_shared_tokens=num_shared_tokens,
        page_tokens=page_tokens,
    )
    wanted = {b for b in expected.union(branch_points) if num_hit_tokens < b <= num_prompt_tokens}
    interval = max(interval_tokens // page_tokens, 1) * page_tokens
    first = (num_hit_tokens // interval + 1) * interval
    optional = set(range(first, num_prompt_tokens + 1, interval)) - wanted
    return CheckpointPlan(tuple(sorted(wanted)), tuple(sorted(optional)))


def is_turn_end_useful(num_prompt_tokens: int, num_stable_tokens: int) -> bool:
    """Whether a later request can match beyond this prompt into its answer.

    The client says so by calling the whole prompt stable; without a hint it may.
    """
    return num_stable_tokens == 0 or num_stable_tokens >= num_prompt_tokens
