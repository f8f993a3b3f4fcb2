"""Lets requests that arrive together compute a shared prefix once."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import islice

from kiln_engine.scheduling.checkpoints import plan_checkpoints
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.memory import SequenceMemory
from kiln_engine.scheduling.sequence import Sequence, num_common_pages

# How many waiting requests are compared with one that starts.
_NUM_COMPARED = 32
# A branch this close to another checkpoint is not worth a slot of its own.
_MIN_BRANCH_GAIN_PAGES = 2


def is_about_to_hit(sequence: Sequence, running: Iterable[Sequence], memory: SequenceMemory) -> bool:
    """Whether a running prefill is about to leave a checkpoint this sequence could start from.

    Then waiting a step or two is cheaper than computing the same tokens beside it.
    """
    best = 0
    for other in running:
        if other.pending_checkpoints or other.wanted_checkpoints:
            reach = min(num_common_pages(sequence, other) * memory.page_tokens, len(sequence.tokens) - 1)
            coming = [checkpoint.num_tokens for checkpoint in other.pending_checkpoints]
            coming += other.wanted_checkpoints
            best = max([best, *(boundary for boundary in coming if boundary <= reach)])
    if best == 0:
        return False
    return best > memory.tree.match(sequence.namespace, sequence.tokens, best).num_hit_tokens


def branch_points(
    sequence: Sequence, num_matched_tokens: int, waiting: SequenceOf[Sequence], page_tokens: int
) -> tuple[int, ...]:
    """Boundaries where the prompt of a sequence that starts parts from one that is known.

    Known are the cached pages it matched beyond its hit, and the prompts that wait.
    """
    hit = sequence.num_computed
    points = {num_matched_tokens} if num_matched_tokens > hit else set()
    for other in islice(waiting, _NUM_COMPARED):
        common = num_common_pages(sequence, other)
        boundary = min(common, (len(other.tokens) - 1) // page_tokens) * page_tokens
        is_same_prompt = common == len(sequence.page_hashes) == len(other.page_hashes)
        if not is_same_prompt and boundary >= hit + _MIN_BRANCH_GAIN_PAGES * page_tokens:
            points.add(boundary)
    return tuple(sorted(points))


def want_checkpoints(sequence: Sequence, branches: tuple[int, ...], limits: SchedulerLimits) -> None:
    """Note where along its prompt a sequence that starts is to leave checkpoints."""
    request = sequence.request
    checkpoints = plan_checkpoints(
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_stable_tokens=request.num_stable_prefix_tokens,
        num_shared_tokens=request.num_shared_prefix_tokens,
        num_hit_tokens=sequence.num_computed,
        branch_points=tuple(map(limits.whole_units, branches)),
        page_tokens=limits.cache_unit_tokens,
        interval_tokens=limits.checkpoint_interval_tokens,
    )
    sequence.wanted_checkpoints = list(checkpoints.wanted)
    sequence.optional_checkpoints = list(checkpoints.optional)
