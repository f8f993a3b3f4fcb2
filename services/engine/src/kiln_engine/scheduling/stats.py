"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kiln_engine.scheduling.memory import SequenceMemory


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start, changed by the loop thread only."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    # Prompt tokens that came from the prefix cache.
    num_cached_tokens: int = 0
    # Tokens that matched cached pages but had to be computed for want of a state checkpoint.
    num_tokens_lost_for_want_of_checkpoint: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """One moment of the scheduler. Names as in EngineStats of engine.proto."""

    num_running: int
    num_waiting: int
    num_pages_in_use: int
    num_pages_cached: int
    num_pages: int
    num_state_slots_in_use: int
    num_state_slots_cached: int
    num_state_slots: int
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_tokens_lost_for_want_of_checkpoint: int
    num_preemptions: int


def scheduler_stats(
    memory: SequenceMemory, counters: SchedulerCounters, *, num_running: int, num_waiting: int
) -> SchedulerStats:
    """The moment of a scheduler with this memory and these totals."""
    pages, states = memory.pages, memory.states
    return SchedulerStats(
        num_running=num_running,
        num_waiting=num_waiting,
        num_pages_in_use=pages.num_referenced,
        num_pages_cached=pages.num_only_cached,
        num_pages=pages.num_ids,
        num_state_slots_in_use=states.num_referenced,
        num_state_slots_cached=states.num_only_cached,
        num_state_slots=states.num_ids,
        **asdict(counters),
    )
