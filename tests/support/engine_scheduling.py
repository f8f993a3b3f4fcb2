"""Builders for scheduler tests: requests, schedulers, and a step that checks everything."""

from __future__ import annotations

from collections import deque

from kiln_common.errors import KilnError
from kiln_engine.domain import AdapterUse, BatchPlan, GenerationRequest, SamplingParams, SequenceEvent
from kiln_engine.domain.plan import RowSampling
from kiln_engine.domain.ports import PendingStep
from kiln_engine.scheduling import Scheduler, SchedulerLimits, check_invariants
from kiln_engine.simulation.runner import SimulatedRunner, expected_tokens

VOCAB_SIZE = 50
EOS = 7


def make_request(
    request_id: str = "r",
    prompt: list[int] | range = range(10, 30),
    *,
    max_tokens: int = 4,
    adapters: tuple[AdapterUse, ...] = (),
    **fields: object,
) -> GenerationRequest:
    """A request with neutral settings; sampling fields are told apart from the request's by name."""
    sampling_names = SamplingParams.__dataclass_fields__
    sampling = {name: value for name, value in fields.items() if name in sampling_names}
    rest = {name: value for name, value in fields.items() if name not in sampling_names}
    params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(request_id, tuple(prompt), params, adapters=adapters, **rest)  # type: ignore[arg-type]


class SchedulerRig:
    """A real scheduler with the simulated runner; checks the invariants around every step.

    With `run_ahead` 1 a step is planned before the one that runs is committed, as the loop does it.
    """

    def __init__(
        self,
        *,
        run_ahead: int = 0,
        num_pages: int = 64,
        num_state_slots: int = 16,
        max_running: int = 8,
        step_token_budget: int = 64,
        max_model_len: int = 512,
        page_tokens: int = 4,
        checkpoint_interval_tokens: int = 64,
        fixed_chunk_tokens: int = 0,
    ) -> None:
        limits = SchedulerLimits(
            num_pages=num_pages,
            num_state_slots=num_state_slots,
            max_model_len=max_model_len,
            max_running=max_running,
            step_token_budget=step_token_budget,
            page_tokens=page_tokens,
            checkpoint_interval_tokens=checkpoint_interval_tokens,
            fixed_chunk_tokens=fixed_chunk_tokens,
        )
        self.scheduler = Scheduler(limits, frozenset({EOS}))
        self.runner = SimulatedRunner(vocab_size=VOCAB_SIZE, page_tokens=page_tokens)
        self.run_ahead = run_ahead
        self.launched: deque[tuple[BatchPlan, PendingStep]] = deque()
        self.events: dict[str, list[SequenceEvent]] = {}
        self.plans: list[BatchPlan] = []

    def add(self, request: GenerationRequest, slots: tuple[tuple[int, float], ...] = ()) -> None:
        self.scheduler.add(request, slots)

    def step(self, now: float = 0.0) -> BatchPlan:
        """Expire, plan and launch once, and commit what is due."""
        self.record(self.scheduler.expire(now))
        plan = self.launch(now)
        self.settle(0 if plan.is_empty else self.run_ahead)
        return plan

    def launch(self, now: float = 0.0) -> BatchPlan:
        """Plan a step and start it, if there is anything to do."""
        plan = self.scheduler.plan(now)
        check_invariants(self.scheduler)
        if not plan.is_empty:
            self.plans.append(plan)
            self.launched.append((plan, self.runner.launch(plan)))
        return plan

    def settle(self, num_left: int = 0) -> None:
        """Commit launched steps until `num_left` are under way."""
        while len(self.launched) > num_left:
            plan, pending = self.launched.popleft()
            self.record(self.scheduler.commit(plan, pending.wait()))
            check_invariants(self.scheduler)

    def fail(self, error: KilnError) -> None:
        """Have every launched step fail."""
        while self.launched:
            plan, _ = self.launched.popleft()
            self.record(self.scheduler.fail(plan, error))
            check_invariants(self.scheduler)

    def run(self, most_steps: int = 1000) -> None:
        """Step until no work is left."""
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                self.settle()
                return
            is_waiting = bool(self.launched)
            assert not self.step().is_empty or is_waiting, "the scheduler has work but plans nothing"
        raise AssertionError(f"work is left after {most_steps} steps")

    def generate(self, request: GenerationRequest, slots: tuple[tuple[int, float], ...] = ()) -> list[int]:
        """Run one request to its end; its tokens."""
        self.add(request, slots)
        self.run()
        return self.tokens(request.request_id)

    def record(self, events: list[SequenceEvent]) -> None:
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def tokens(self, request_id: str) -> list[int]:
        return [event.row.token_id for event in self.events.get(request_id, []) if event.row]

    def first(self, request_id: str) -> SequenceEvent:
        """The event with the request's first token."""
        return next(event for event in self.events[request_id] if event.is_first)

    def last(self, request_id: str) -> SequenceEvent:
        return self.events[request_id][-1]


def expected_completion(
    request: GenerationRequest, slots: tuple[tuple[int, float], ...], count: int
) -> list[int]:
    """The first tokens that the request must get, however it is scheduled."""
    params = request.sampling
    stops = params.stop_token_ids | (frozenset() if params.ignore_eos else frozenset({EOS}))
    samplings = [
        RowSampling(params, index, banned_token_ids=stops if index < params.min_tokens else frozenset())
        for index in range(count)
    ]
    return expected_tokens(request.prompt_token_ids, slots, samplings, VOCAB_SIZE)
