"""Builders for scheduler tests: requests, schedulers, and a step that checks everything."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kiln_common.errors import KilnError
from kiln_engine.domain import AdapterUse, BatchPlan, GenerationRequest, SamplingParams, SequenceEvent
from kiln_engine.domain.plan import RowSampling
from kiln_engine.domain.ports import PendingStep
from kiln_engine.domain.speculation import Candidate
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


class Guesser:
    """A speculator that guesses what it is told: `guess(candidate, count)` are the drafts of a candidate.

    `wants` says how far each candidate guesses, as far as it may by default. With `on_device` the runner
    makes the drafts.
    """

    def __init__(
        self,
        guess: Callable[[Candidate, int], Sequence[int]] = lambda candidate, count: (),
        *,
        max_draft_tokens: int = 3,
        on_device: bool = False,
        wants: Callable[[Candidate], int] = lambda candidate: candidate.most_drafts,
    ) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.drafts_on_device = on_device
        self._guess, self._wants = guess, wants
        self.num_drafted = self.num_accepted = self.num_steps = 0
        self.known: set[int] = set()

    def lengths(self, candidates: Sequence[Candidate]) -> list[int]:
        self.known.update(candidate.sequence_id for candidate in candidates)
        return [self._wants(candidate) for candidate in candidates]

    def propose(self, candidate: Candidate, num_tokens: int) -> tuple[int, ...]:
        assert not self.drafts_on_device
        return tuple(self._guess(candidate, num_tokens))[:num_tokens]

    def observe(self, sequence_id: int, adapters: object, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted <= self.max_draft_tokens
        self.num_drafted += drafted
        self.num_accepted += accepted

    def observe_step(self, plan: BatchPlan, seconds: float) -> None:
        self.num_steps += 1

    def forget(self, sequence_id: int) -> None:
        self.known.discard(sequence_id)


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
        speculator: Guesser | None = None,
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
            max_draft_tokens=speculator.max_draft_tokens if speculator else 0,
        )
        self.scheduler = Scheduler(limits, frozenset({EOS}), speculator)
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


def right_guesses(rig: Callable[[], SchedulerRig], period: int = 0) -> Callable[[Candidate, int], list[int]]:
    """Guesses of the tokens that will come; with a period every so manieth of the answer is wrong."""

    def guess(candidate: Candidate, count: int) -> list[int]:
        [sequence] = [s for s in rig().scheduler.running if s.sequence_id == candidate.sequence_id]
        first = len(candidate.token_ids) - candidate.num_prompt_tokens
        answer = expected_completion(sequence.request, sequence.adapter_slots, first + count)
        indexed = list(enumerate(answer))[first:]
        return [
            (token + 1) % VOCAB_SIZE if period and index % period == period - 1 else token
            for index, token in indexed
        ]

    return guess


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
