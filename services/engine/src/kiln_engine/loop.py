"""The engine's one writer: a thread that plans, launches and commits steps, and answers the mailbox."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from kiln_common.errors import KilnError
from kiln_common.histogram import STEP_SECONDS, Histogram
from kiln_engine.domain.adapter import AdapterChange
from kiln_engine.domain.errors import EngineDraining, EngineFailed
from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.ports import Clock, PendingStep, Runner
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import FinishReason, SequenceEvent
from kiln_engine.mailbox import AbortRequest, Command, Mailbox, RunBetweenSteps, Sink, SubmitRequest
from kiln_engine.scheduling import Scheduler, SchedulerStats

log = structlog.get_logger()
T = TypeVar("T")

# Steps that fail one after the other before the engine gives itself up.
_MOST_FAILURES = 3
# A scheduler that has work but no plan is a bug; the loop must not spin on it.
_STUCK_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    plan: BatchPlan
    pending: PendingStep
    launched_s: float


class EngineLoop:
    """Runs the scheduler and the runner on a thread of its own.

    With `run_ahead` 1 the next step is planned and launched while one runs, and results are taken in
    one step late, so that the device never waits for the host; with 0 each step is taken in before
    the next is planned. Where a step must be taken in first all the same, because it verifies drafts,
    its events go out when the next one has been launched.

    Every submitted request gets events in its sink until the one with a finish reason; and its id
    goes once to `on_ended`, when no step works on it any more, also when nobody listens to the sink.
    A failed step ends the requests that were part of it or of those launched after it; after several
    failures in a row, or a failure of the scheduler itself, all requests end, the loop ends and
    `on_unhealthy` is called: the process should be started again.

    `on_ended` and `on_unhealthy` are called on the loop thread and must not wait.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        *,
        run_ahead: int = 0,
        on_ended: Callable[[list[str]], None] = lambda _: None,
        on_unhealthy: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._run_ahead = run_ahead
        self._on_ended = on_ended
        self._on_unhealthy = on_unhealthy
        self._mailbox = Mailbox()
        # Out of the mailbox and not yet carried out.
        self._taken: deque[Command] = deque()
        # Steps under way, in the order of their launch.
        self._launched: deque[_LaunchedStep] = deque()
        self._sinks: dict[str, Sink] = {}
        # Events that wait until the device has work again: the next step needs the host more.
        self._undelivered: list[SequenceEvent] = []
        # Requests that had their last event, each with the last step that may still work on it.
        self._ended_ids: deque[tuple[int, str]] = deque()
        self._num_failures = 0
        self._is_healthy = True
        self.step_seconds = Histogram(STEP_SECONDS)
        self._last_ended_s = -math.inf
        # Whether there was nothing to do since the last step ended.
        self._was_idle = True
        self._stats = scheduler.stats()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    @property
    def is_healthy(self) -> bool:
        return self._is_healthy

    @property
    def stats(self) -> SchedulerStats:
        """As of the last step; may be read from any thread."""
        return self._stats

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request with "engine_draining" and the thread with them; waits for the steps."""
        self._mailbox.close()
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self, request: GenerationRequest, adapter_slots: tuple[tuple[int, float], ...], sink: Sink
    ) -> None:
        """Hand over a request; its adapters must stay in their slots until `on_ended` names it.

        Raises:
            EngineDraining, EngineFailed: the loop has ended, as asked or because steps failed.
        """
        if not self._mailbox.put(SubmitRequest(request, adapter_slots, sink)):
            raise self._ended()

    def abort(self, request_id: str, error: KilnError | None = None) -> None:
        """End a request at the next step boundary, with `error` if given; unknown ids are ignored."""
        self._mailbox.put(AbortRequest(request_id, error))

    def run_between_steps(self, function: Callable[[], T], *, settles: bool = True) -> Future[T]:
        """Have something called on the loop thread while no step runs.

        With `settles` off the device is not waited for: it must be of no concern to the steps that
        are under way.
        """
        command = RunBetweenSteps(function, settles)
        if not self._mailbox.put(command):
            command.done.set_exception(self._ended())
        return command.done

    def retire_adapter(self, sha256: str) -> None:
        """Let go of what was cached with an adapter before anything else. Loop thread only."""
        self._scheduler.retire_adapter(sha256)

    def checkpoint_names(self) -> frozenset[bytes]:
        """Beginnings of prompts that need not be computed again. Loop thread only."""
        return self._scheduler.memory.tree.checkpoint_names()

    def move(self, request_id: str, change: AdapterChange) -> bool:
        """Let a request go on with other adapters. Loop thread only, while no step runs."""
        return self._scheduler.move(request_id, change)

    def _ended(self) -> KilnError:
        if self._is_healthy:
            return EngineDraining("the engine has stopped")
        return EngineFailed("the engine failed and will be restarted")

    def _run(self) -> None:
        try:
            self._run_steps()
        except Exception as error:
            log.error("scheduler_failed", exc_info=error)
            self._give_up()
        self._refuse([*self._taken, *self._mailbox.take_all(wait=False)])

    def _run_steps(self) -> None:
        """Step until the mailbox closes, then end every request."""
        has_plan = True
        while not self._mailbox.is_closed:
            is_idle = not self._scheduler.has_work and not self._launched
            self._was_idle |= is_idle
            timeout_s = None if is_idle else _STUCK_WAIT_S
            self._taken.extend(self._mailbox.take_all(wait=is_idle or not has_plan, timeout_s=timeout_s))
            self._handle_taken()
            has_plan = self._is_healthy and self._step()
            self._stats = self._scheduler.stats()
        self._settle(num_left=0)
        if self._is_healthy:
            self._deliver(self._scheduler.fail_all(EngineDraining("the engine is stopping")))
            self._stats = self._scheduler.stats()

    def _refuse(self, commands: Iterable[Command]) -> None:
        """Tell whoever left a command as the loop ended."""
        for command in commands:
            match command:
                case SubmitRequest(request, _, sink):
                    sink.offer([_failure(request.request_id, self._ended())])
                    self._on_ended([request.request_id])
                case RunBetweenSteps(_, _, done):
                    if done.set_running_or_notify_cancel():
                        done.set_exception(self._ended())
                case AbortRequest():
                    pass  # it has ended

    def _handle_taken(self) -> None:
        if self._taken:
            # What comes may use an id again, or ask which tokens are out.
            self._deliver([])
        while self._taken and self._is_healthy:
            match command := self._taken[0]:
                case SubmitRequest():
                    self._add(command)
                case AbortRequest(request_id, error):
                    event = self._scheduler.abort(request_id)
                    if event is not None:
                        self._deliver([event if error is None else _failure(request_id, error)])
                case RunBetweenSteps():
                    if command.settles:
                        self._settle(num_left=0)
                        self._deliver([])
                    if not self._is_healthy:
                        return
                    _call(command)
            self._taken.popleft()

    def _add(self, command: SubmitRequest) -> None:
        request = command.request
        try:
            self._scheduler.add(request, command.adapter_slots)
        except KilnError as error:
            command.sink.offer([_failure(request.request_id, error)])
            if request.request_id not in self._sinks:
                self._on_ended([request.request_id])
        else:
            self._sinks[request.request_id] = command.sink

    def _step(self) -> bool:
        """Launch the next step and take in those that are due; False when there was neither."""
        now = self._clock.now()
        if expired := self._scheduler.expire(now):
            self._deliver(expired)
        plan = self._scheduler.plan(now) if self._scheduler.has_work else None
        if plan is not None and not plan.is_empty:
            self._launch(plan)
            self._deliver([])
            self._settle(num_left=self._run_ahead)
        elif self._launched:
            self._settle(num_left=0)
        elif plan is not None:
            self._deliver([])
            log.error("scheduler_stuck", waiting=self._scheduler.stats().num_waiting)
            return False
        return True

    def _launch(self, plan: BatchPlan) -> None:
        launched_s = self._clock.now()
        try:
            pending = self._runner.launch(plan)
        except Exception as error:  # noqa: BLE001 whatever the device did, other requests go on
            self._settle(num_left=0)  # the steps before are none of its business
            if self._is_healthy:
                self._fail_steps([plan], error)
        else:
            self._launched.append(_LaunchedStep(plan, pending, launched_s))
            if len(self._launched) == 1:
                self._draw_oldest()

    def _settle(self, num_left: int) -> None:
        """Wait for steps and take in their results, until `num_left` are under way."""
        while len(self._launched) > num_left:
            step = self._launched[0]
            try:
                result = step.pending.wait()
            except Exception as error:  # noqa: BLE001 as above
                self._fail_launched(error)
            else:
                self._launched.popleft()
                self._time(step)
                events = self._scheduler.commit(step.plan, result)
                if self._run_ahead and not self._launched and self._scheduler.has_work:
                    self._undelivered += events
                else:
                    self._deliver(events)
                self._num_failures = 0
                self._draw_oldest()

    def _time(self, step: _LaunchedStep) -> None:
        """Count a step that has ended; what it spent behind the step before is that one's."""
        now = self._clock.now()
        seconds = now - max(step.launched_s, self._last_ended_s)
        self.step_seconds.observe(seconds)
        # What the host needed between the two counts as well: a step ahead hides it, drafts do not.
        passed_s = now - (step.launched_s if self._was_idle else self._last_ended_s)
        self._scheduler.observe_step(step.plan, passed_s)
        self._last_ended_s, self._was_idle = now, False

    def _draw_oldest(self) -> None:
        """Draw what the oldest step under way had left until the steps before it were taken in."""
        if self._launched:
            try:
                self._launched[0].pending.draw()
            except Exception as error:  # noqa: BLE001 as above
                self._fail_launched(error)

    def _fail_launched(self, error: Exception) -> None:
        plans = [launched.plan for launched in self._launched]
        self._launched.clear()
        self._fail_steps(plans, error)

    def _fail_steps(self, plans: list[BatchPlan], error: Exception) -> None:
        """End what was part of a step that failed, or of one that was launched on top of it."""
        log.error("step_failed", step=plans[0].step_id, tokens=plans[0].num_tokens, exc_info=error)
        failure = error if isinstance(error, KilnError) else EngineFailed("the model's step failed")
        for plan in plans:
            self._deliver(self._scheduler.fail(plan, failure))
        self._num_failures += 1
        if self._num_failures >= _MOST_FAILURES:
            self._give_up()

    def _give_up(self) -> None:
        """End every request and the loop, without the scheduler: its books may be wrong."""
        self._is_healthy = False
        self._mailbox.close()
        self._launched.clear()
        log.error("engine_unhealthy", failures=self._num_failures)
        ended = {event.request_id for event in self._undelivered if event.finish_reason is not None}
        left = [request_id for request_id in self._sinks if request_id not in ended]
        try:
            # With what waits: a full sink then has no request that the scheduler would have to abort.
            self._deliver([_failure(request_id, self._ended()) for request_id in left])
        finally:
            self._on_unhealthy()

    def _deliver(self, events: list[SequenceEvent]) -> None:
        """Give each sink its events at once, those that waited first; abort requests whose sinks are full."""
        events = [*self._undelivered, *events]
        self._undelivered.clear()
        while events:
            by_sink: dict[Sink, list[SequenceEvent]] = {}
            last_step_id = self._launched[-1].plan.step_id if self._launched else 0
            for event in events:
                by_sink.setdefault(self._sinks[event.request_id], []).append(event)
                if event.finish_reason is not None:
                    del self._sinks[event.request_id]
                    self._ended_ids.append((last_step_id, event.request_id))
            full = {sink for sink, batch in by_sink.items() if not sink.offer(batch)}
            cut_off = [request_id for request_id, sink in self._sinks.items() if sink in full] if full else []
            aborted = [self._scheduler.abort(request_id) for request_id in cut_off]
            events = [event for event in aborted if event is not None]
        self._report_ended()

    def _report_ended(self) -> None:
        """Name the requests whose last event came before the oldest step under way was launched."""
        oldest = self._launched[0].plan.step_id if self._launched else math.inf
        ended = []
        while self._ended_ids and self._ended_ids[0][0] < oldest:
            ended.append(self._ended_ids.popleft()[1])
        if ended:
            self._on_ended(ended)


def _failure(request_id: str, error: KilnError) -> SequenceEvent:
    return SequenceEvent(request_id, finish_reason=FinishReason.ERROR, error=error)


def _call(command: RunBetweenSteps) -> None:
    if not command.done.set_running_or_notify_cancel():
        return
    try:
        result: Any = command.function()
    except Exception as error:  # noqa: BLE001 it belongs to whoever asked
        command.done.set_exception(error)
    else:
        command.done.set_result(result)
