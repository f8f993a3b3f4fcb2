"""Drives the real scheduler with a workload on a clock of its own, and sums up what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import SequenceEvent
from kiln_engine.scheduling import Scheduler, SchedulerLimits, SchedulerStats, check_invariants
from kiln_engine.simulation.runner import SimulatedRunner
from kiln_engine.simulation.workload import adapter_slots_of


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Simulated seconds of a step: a part of its own, and one for each token and row."""

    step_s: float = 0.004
    prefill_token_s: float = 0.00005
    decode_row_s: float = 0.0002


@dataclass(slots=True)
class Summary:
    """What a run did. Times are simulated seconds."""

    stats: SchedulerStats
    simulated_s: float = 0.0
    num_ended: int = 0
    decode_batch_sizes: list[int] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)


def simulate(
    requests: list[GenerationRequest],
    limits: SchedulerLimits,
    costs: StepCosts,
    *,
    vocab_size: int,
    is_checking: bool = False,
) -> Summary:
    """Run the requests to their ends. `is_checking` counts every reference again after each step."""
    scheduler = Scheduler(limits, frozenset())
    runner = SimulatedRunner(vocab_size=vocab_size, page_tokens=limits.page_tokens)
    coming = sorted(requests, key=lambda request: request.arrival_s, reverse=True)
    summary = Summary(scheduler.stats())
    now = 0.0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, coming[-1].arrival_s)
        while coming and coming[-1].arrival_s <= now:
            request = coming.pop()
            scheduler.add(request, adapter_slots_of(request))
        plan = scheduler.plan(now)
        num_prefill_tokens = plan.num_tokens - len(plan.decode_rows)
        now += (
            costs.step_s
            + costs.prefill_token_s * num_prefill_tokens
            + costs.decode_row_s * len(plan.decode_rows)
        )
        _count(summary, scheduler.commit(plan, runner.execute(plan)))
        summary.step_tokens.append(plan.num_tokens)
        if plan.decode_rows:
            summary.decode_batch_sizes.append(len(plan.decode_rows))
        if is_checking:
            check_invariants(scheduler)
    summary.stats = scheduler.stats()
    summary.simulated_s = now
    return summary


def _count(summary: Summary, events: list[SequenceEvent]) -> None:
    for event in events:
        summary.num_ended += event.finish_reason is not None
        if event.is_first:
            summary.queue_s.append(event.queue_s)
