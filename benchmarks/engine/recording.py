"""What came back from the engine and when: the source of every figure of these benchmarks.

The loop hands a step's events over as soon as it has read the step's results from the device. While
the device has a step to run at all times, the time between two arrivals is therefore the time the
device took for one step, however far ahead of it the host launches.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.percentiles import percentile
from kiln_engine.domain import FinishReason, SequenceEvent

# Rows that began together commit their states together once in so many steps: a mean over whole
# pages counts the commits as often as they happen.
PAGE_STEPS = 16
# Steps left out after the last first token, in which the pipeline of prefill and decode drains.
_SETTLING_STEPS = 2


class RequestFailed(Exception):
    """A request of a benchmark ended otherwise than asked: nothing measured with it counts."""


class TooFewSteps(Exception):
    """The pure decode phase was shorter than a page of steps."""


@dataclass(frozen=True)
class Distribution:
    """Of durations, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    num_samples: int

    @classmethod
    def of(cls, durations_s: Sequence[float]) -> Distribution:
        if not durations_s:
            raise TooFewSteps("nothing was measured")
        ordered = sorted(durations_s)
        p50, p90, p99 = (1e3 * percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, 1e3 * statistics.fmean(ordered), len(ordered))


@dataclass(frozen=True)
class DecodeWindow:
    """Steps in which every request decoded. `mean_num_outputs`: tokens a request had drawn by their middle."""

    steps_s: list[float]
    mean_num_outputs: float

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self.steps_s)


@dataclass
class Recording:
    """Every step's events with the time of their arrival, in seconds of one clock."""

    started_s: float
    num_requests: int
    arrivals: list[tuple[float, list[SequenceEvent]]] = field(default_factory=list)

    def check(self, *, may_stop: bool = False) -> None:
        """Raises:
        RequestFailed: not every request came to the end it asked for, or where it may, to its own.
        """
        wanted = {FinishReason.LENGTH, FinishReason.STOP} if may_stop else {FinishReason.LENGTH}
        ends = [event for _, events in self.arrivals for event in events if event.finish_reason]
        for event in ends:
            if event.finish_reason not in wanted:
                raise RequestFailed(f"{event.request_id} ended with {event.finish_reason}: {event.error}")
        if len(ends) != self.num_requests:
            raise RequestFailed(f"{len(ends)} of {self.num_requests} requests ended")

    @property
    def num_tokens(self) -> int:
        """Tokens drawn."""
        return sum(event.row is not None for _, events in self.arrivals for event in events)

    @property
    def duration_s(self) -> float:
        """From the submission of the requests to the arrival of the last token."""
        return self.arrivals[-1][0] - self.started_s

    @property
    def first_token_s(self) -> list[float]:
        """Seconds from the submission to each request's first token."""
        return [
            time_s - self.started_s for time_s, events in self.arrivals for event in events if event.is_first
        ]

    @property
    def num_cached_tokens(self) -> list[int]:
        """Prompt tokens that each request found in the prefix cache."""
        return [event.num_cached_tokens for _, events in self.arrivals for event in events if event.is_first]

    def tokens_by_request(self) -> dict[str, list[SequenceEvent]]:
        """Each request's events with a token, in order."""
        by_request: dict[str, list[SequenceEvent]] = {}
        for _, events in self.arrivals:
            for event in events:
                if event.row is not None:
                    by_request.setdefault(event.request_id, []).append(event)
        return by_request

    def decode_window(self) -> DecodeWindow:
        """The steps after the last first token and before the first end, whole pages of them.

        Raises:
            TooFewSteps: there are less than a page's worth, or rows were missing from one of them.
        """
        last_first = max(i for i, (_, events) in enumerate(self.arrivals) if any(e.is_first for e in events))
        first_end = min(
            i for i, (_, events) in enumerate(self.arrivals) if any(e.finish_reason for e in events)
        )
        start = last_first + _SETTLING_STEPS
        num_steps = (first_end - start - 1) // PAGE_STEPS * PAGE_STEPS
        if num_steps < PAGE_STEPS:
            raise TooFewSteps(f"{first_end - start} steps lie between the last first token and the first end")
        window = self.arrivals[start : start + num_steps + 1]
        if any(len(events) != self.num_requests for _, events in window):
            raise TooFewSteps("not every request had a row in every step: the pools are too small")
        num_before = sum(len(events) for _, events in self.arrivals[: start + 1])
        return DecodeWindow(
            steps_s=[after - before for (before, _), (after, _) in itertools.pairwise(window)],
            mean_num_outputs=num_before / self.num_requests + num_steps / 2,
        )


class Recorder:
    """The client of a batch of requests, as the loop sees it: a sink that keeps everything."""

    def __init__(
        self,
        num_requests: int,
        clock: Callable[[], float] = time.perf_counter,
        on_ends: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_ends` is told on the loop's thread how many requests a step has ended."""
        self._clock = clock
        self._on_ends = on_ends
        self._num_left = num_requests
        self._all_ended = threading.Event()
        self.recording = Recording(clock(), num_requests)

    def offer(self, events: list[SequenceEvent]) -> bool:
        """Take a step's events; called on the loop's thread, so the rest of the work comes later."""
        self.recording.arrivals.append((self._clock(), events))
        num_ended = sum(event.finish_reason is not None for event in events)
        self._num_left -= num_ended
        if self._num_left == 0:
            self._all_ended.set()
        elif num_ended:
            self._on_ends(num_ended)
        return True

    def wait(self, timeout_s: float, *, may_stop: bool = False) -> Recording:
        """The recording once every request has ended as asked.

        Raises:
            RequestFailed: one did not, or not in time.
        """
        if not self._all_ended.wait(timeout_s):
            raise RequestFailed(f"{self._num_left} requests had not ended after {timeout_s:.0f} s")
        self.recording.check(may_stop=may_stop)
        return self.recording
