"""The real loop, scheduler and speculator over a device of made-up times and made-up acceptance.

A clock of its own tells the time, so that what comes out depends on no machine.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kiln_engine.domain import BatchPlan, GenerationRequest, SamplingParams, SequenceEvent, VerifyRow
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.result import RowResult, StepResult, VerifyResult
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from kiln_engine.speculation.speculator import DraftSpeculator

_TOKEN = 5
_PROMPT_TOKENS = 32
_MOST_RUNNING = 256
# Every so manieth step is held up by something else; it and the first of a kind take so many times as long.
_HELD_UP_EVERY = 97
_HELD_UP = 2.0


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Milliseconds of the passes of one batch: plain, verifying two or all lines a row, and drafting."""

    plain: float
    two_lines: float
    all_lines: float
    draft: float
    # What the host needs between two steps, which hides behind a plain step and behind drafting.
    host: float = 0.4
    # What chunks of prompts add to a step.
    chunk: float = 1.0

    def verify(self, num_verified: int) -> float:
        return self.two_lines if num_verified <= 1 else self.all_lines


@dataclass
class Speculation:
    """What an engine did: after each step its time, its tokens so far, and the drafts it made a row."""

    steps: list[tuple[float, int, int]] = field(default_factory=list)
    # Where requests come in waves: of each, when the last of them had begun and when the first one ended.
    waves: list[tuple[float, float]] = field(default_factory=list)

    def speed(self, begin_s: float = 0.0, end_s: float = float("inf")) -> float:
        """Tokens per second between two times."""
        window = [(time_s, tokens) for time_s, tokens, _ in self.steps if begin_s <= time_s <= end_s]
        (first_s, first), (last_s, last) = window[0], window[-1]
        return (last - first) / (last_s - first_s)

    def share(self, length: int, begin_s: float = 0.0) -> float:
        """Of the steps from a time on, those that drafted so many tokens."""
        lengths = [drafted for time_s, _, drafted in self.steps if time_s >= begin_s]
        return lengths.count(length) / len(lengths)


class _Device:
    """Clock, device, clients in one; everything happens on the loop's thread."""

    def __init__(
        self,
        times: DeviceTimes,
        num_rows: int,
        acceptance: Callable[[float], float],
        seconds: float,
        speculator: DraftSpeculator | None,
        answer_tokens: int,
        seed: int,
        *,
        is_in_waves: bool,
    ) -> None:
        self._times, self._acceptance, self._seconds = times, acceptance, seconds
        self._answer_tokens, self._is_in_waves = answer_tokens, is_in_waves
        self._num_rows, self._num_left = num_rows, 0
        # Of this wave: how many have begun and ended, and when the last of them had begun.
        self._num_begun = self._num_ended = 0
        self._begun_s = 0.0
        # Apart, so that the requests are the same whatever is drafted.
        self._lengths, self._rng = random.Random(seed), random.Random(seed)
        self._seen: set[tuple[int, int]] = set()
        self._now_s = self._free_s = 0.0
        self._num_tokens = self._num_requests = self._num_launched = 0
        self.done = Speculation()
        self._has_ended = threading.Event()
        most_tokens = _PROMPT_TOKENS + 2 * answer_tokens
        limits = SchedulerLimits(
            num_pages=num_rows * (most_tokens // 16 + 2),
            num_state_slots=4 * num_rows + 1,
            max_model_len=most_tokens,
            max_running=_MOST_RUNNING,
            step_token_budget=8192,
            max_draft_tokens=speculator.max_draft_tokens if speculator else 0,
        )
        scheduler = Scheduler(limits, frozenset(), speculator)
        self._loop = EngineLoop(scheduler, self, self, run_ahead=1, on_ended=self._come_again)
        self._come_again([""] * num_rows)

    def run(self) -> Speculation:
        self._loop.start()
        self._has_ended.wait()
        self._loop.stop()
        assert self._loop.is_healthy
        return self.done

    def now(self) -> float:
        """The clock."""
        return self._now_s

    def offer(self, events: list[SequenceEvent]) -> bool:
        """The client."""
        for event in events:
            self._num_begun += event.is_first
            if event.is_first and self._num_begun == self._num_rows:
                self._begun_s = self._now_s
            if event.finish_reason is not None:
                self._num_ended += 1
                if self._num_ended == 1:
                    self.done.waves.append((self._begun_s, self._now_s))
        return True

    def launch(self, plan: BatchPlan) -> _Step:
        times, rows = self._times, plan.verify_rows
        num_verified = max(plan.num_verify_lines - 1, 0)
        num_drafted = max((row.num_next_drafts for row in rows), default=0)
        # What the host did since it read the last result; a device that has work does not wait for it.
        self._now_s += 1e-3 * times.host
        pass_ms = times.plain if plan.decode_rows else 0.0
        pass_ms += times.verify(num_verified) if rows else 0.0
        pass_ms += times.chunk if plan.prefill_chunks else 0.0
        held_up = self._held_up(num_verified, num_drafted)
        drawn_s = max(self._now_s, self._free_s) + 1e-3 * held_up * pass_ms
        self._free_s = drawn_s + 1e-3 * num_drafted * times.draft
        verified = tuple(self._verified(row) for row in rows)
        drawing = [row.sequence_id for row in plan.decode_rows]
        drawing += [chunk.sequence_id for chunk in plan.prefill_chunks if chunk.sampling]
        drawn = tuple(_row_result(sequence_id) for sequence_id in drawing)
        self._num_tokens += len(drawn) + sum(len(result.rows) for result in verified)
        self._num_launched += 1
        # Behind the end there may be more: the loop goes on until it is stopped.
        if drawn_s <= self._seconds:
            self.done.steps.append((drawn_s, self._num_tokens, num_drafted))
        return _Step(StepResult(plan.step_id, drawn, verified=verified), drawn_s, self._wait_until)

    def _held_up(self, num_verified: int, num_drafted: int) -> float:
        kind = num_verified, num_drafted
        is_first = kind not in self._seen
        self._seen.add(kind)
        return _HELD_UP if is_first or self._num_launched % _HELD_UP_EVERY == 0 else 1.0

    def _verified(self, row: VerifyRow) -> VerifyResult:
        acceptance, num_accepted = self._acceptance(self._now_s), 0
        while num_accepted < row.num_drafts and self._rng.random() < acceptance:
            num_accepted += 1
        return VerifyResult(row.sequence_id, (_row_result(row.sequence_id),) * (1 + num_accepted))

    def _wait_until(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)
        if self._now_s >= self._seconds:
            self._has_ended.set()

    def _come_again(self, request_ids: list[str]) -> None:
        if self._now_s >= self._seconds:
            return
        if self._is_in_waves:
            self._num_left -= len(request_ids) if self._num_requests else 0
            if self._num_left:
                return
            request_ids, self._num_left = [""] * self._num_rows, self._num_rows
            self._num_begun = self._num_ended = 0
        for _ in request_ids:
            self._num_requests += 1
            spread = 1.0 if self._is_in_waves else self._lengths.uniform(0.5, 1.5)
            length = round(self._answer_tokens * spread)
            params = SamplingParams(max_tokens=length, ignore_eos=True)
            prompt = tuple(self._lengths.randrange(1000) for _ in range(_PROMPT_TOKENS))
            request = GenerationRequest(str(self._num_requests), prompt, params)
            self._loop.submit(request, (), self)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step whose result is there when the device has come to its draws."""

    result: StepResult
    drawn_s: float
    wait_until: Callable[[float], None]

    def draw(self) -> None:
        """Nothing is left."""

    def wait(self) -> StepResult:
        self.wait_until(self.drawn_s)
        return self.result


def _row_result(sequence_id: int) -> RowResult:
    return RowResult(sequence_id, _TOKEN, logprob=-1.0, sampled_logprob=-1.0, top_logprobs=())


def speculate(
    times: DeviceTimes,
    num_rows: int,
    acceptance: float | Callable[[float], float],
    *,
    seconds: float,
    max_drafts: int = 3,
    is_adaptive: bool = True,
    answer_tokens: int = 256,
    is_in_waves: bool = False,
    seed: int = 0,
) -> Speculation:
    """Run `num_rows` requests at a time, each followed by another, for so many seconds of the made-up clock.

    In waves, the answers are of one length, and the next ones begin together when all have ended.

    `acceptance` is the chance of each draft, or tells it for a time. Without drafts (`max_drafts` 0) all
    decoding is plain; if it is not adaptive, drafts are as long as they may be. Some steps are held up, and
    first ones take longer.
    """
    speculator = None
    if max_drafts:
        sizes = decode_ladder(_MOST_RUNNING)
        speculator = DraftSpeculator(max_drafts, sizes, drafts_on_device=True, is_adaptive=is_adaptive)
    chance = acceptance if callable(acceptance) else lambda _: acceptance
    device = _Device(
        times, num_rows, chance, seconds, speculator, answer_tokens, seed, is_in_waves=is_in_waves
    )
    return device.run()
