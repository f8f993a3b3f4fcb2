"""Drives the real scheduler and loop with a workload on a clock of its own, and sums up what happened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.ports import PendingStep
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import SequenceEvent, StepResult
from kiln_engine.loop import EngineLoop
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


@dataclass(frozen=True, slots=True)
class _TimedStep:
    """A step that is there when the simulated device has come to its end."""

    step: PendingStep
    end_s: float
    wait_until: Callable[[float], None]

    def draw(self) -> None:
        self.step.draw()

    def wait(self) -> StepResult:
        self.wait_until(self.end_s)
        return self.step.wait()


class SimulationFailed(Exception):
    """The loop gave up; its log says why."""


def simulate(
    requests: list[GenerationRequest],
    limits: SchedulerLimits,
    costs: StepCosts,
    *,
    vocab_size: int,
    run_ahead: int = 0,
    is_checking: bool = False,
) -> Summary:
    """Run the requests to their ends. `is_checking` counts every reference again before each step.

    The host takes no simulated time: what running ahead costs shows, and not what it gains.

    Raises:
        SimulationFailed: a step failed, or an invariant did not hold.
    """
    return _Simulation(requests, limits, costs, vocab_size, run_ahead, is_checking).run()


class _Simulation:
    """Clock, device, client and arrivals in one: everything but scheduler and loop.

    All of it happens on the loop's thread, in the order of simulated time, so that the same
    workload always gives the same summary.
    """

    def __init__(
        self,
        requests: list[GenerationRequest],
        limits: SchedulerLimits,
        costs: StepCosts,
        vocab_size: int,
        run_ahead: int,
        is_checking: bool,
    ) -> None:
        self._scheduler = Scheduler(limits, frozenset())
        self._runner = SimulatedRunner(vocab_size=vocab_size, page_tokens=limits.page_tokens)
        self._costs = costs
        self._is_checking = is_checking
        self._coming = sorted(requests, key=lambda request: request.arrival_s, reverse=True)
        self._now = 0.0
        # When the device is through with everything launched.
        self._device_free_s = 0.0
        self._num_live = 0
        self._is_done = threading.Event()
        self._summary = Summary(self._scheduler.stats())
        self._loop = EngineLoop(
            self._scheduler,
            self,
            self,
            run_ahead=run_ahead,
            on_ended=self._ended,
            on_unhealthy=self._is_done.set,
        )

    def run(self) -> Summary:
        self._loop.start()
        self._loop.run_between_steps(lambda: self._ended([]))
        self._is_done.wait()
        self._loop.stop()
        if not self._loop.is_healthy:
            raise SimulationFailed(f"after {self._summary.num_ended} requests; the log has the traceback")
        self._summary.stats = self._loop.stats
        self._summary.simulated_s = self._now
        return self._summary

    def now(self) -> float:
        """The clock."""
        return self._now

    def launch(self, plan: BatchPlan) -> PendingStep:
        """The device: one step after the other."""
        if self._is_checking:
            check_invariants(self._scheduler)
        pending = self._runner.launch(plan)
        num_rows = len(plan.decode_rows)
        costs = self._costs
        step_s = costs.step_s + costs.decode_row_s * num_rows
        step_s += costs.prefill_token_s * (plan.num_tokens - num_rows)
        self._device_free_s = max(self._now, self._device_free_s) + step_s
        self._summary.step_tokens.append(plan.num_tokens)
        if num_rows:
            self._summary.decode_batch_sizes.append(num_rows)
        return _TimedStep(pending, self._device_free_s, self._wait_until)

    def _wait_until(self, time_s: float) -> None:
        """Let simulated time pass, in which requests may arrive."""
        self._now = max(self._now, time_s)
        self._submit_arrived()

    def offer(self, events: list[SequenceEvent]) -> bool:
        """The client."""
        self._summary.queue_s += [event.queue_s for event in events if event.is_first]
        return True

    def _submit_arrived(self) -> None:
        while self._coming and self._coming[-1].arrival_s <= self._now:
            request = self._coming.pop()
            self._num_live += 1
            self._loop.submit(request, adapter_slots_of(request), self)

    def _ended(self, request_ids: list[str]) -> None:
        """Count ends; with nothing left to compute, go to the next arrival."""
        self._num_live -= len(request_ids)
        self._summary.num_ended += len(request_ids)
        if self._num_live == 0:
            if self._coming:
                self._now = max(self._now, self._coming[-1].arrival_s)
                self._submit_arrived()
            else:
                self._is_done.set()
