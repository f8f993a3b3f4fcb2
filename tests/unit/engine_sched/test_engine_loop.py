"""The loop on its own thread, with the real scheduler and a runner that can be held or made to fail."""

import threading

import pytest

from kiln_common.errors import KilnError
from kiln_engine.clock import MonotonicClock
from kiln_engine.domain import FinishReason, SequenceEvent
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from tests.support.engine_scheduling import Guesser, make_request
from tests.support.engine_server import StubbornRunner

WAIT_S = 60.0


class Box:
    """A sink that can be waited on, and that is full after `capacity` steps."""

    def __init__(self, capacity: int = 10_000) -> None:
        self.batches: list[list[SequenceEvent]] = []
        self._capacity = capacity
        self._changed = threading.Condition()

    def offer(self, events: list[SequenceEvent]) -> bool:
        with self._changed:
            if len(self.batches) >= self._capacity:
                return False
            self.batches.append(events)
            self._changed.notify_all()
            return True

    @property
    def events(self) -> list[SequenceEvent]:
        return [event for batch in self.batches for event in batch]

    def wait_for_ends(self, count: int) -> dict[str, SequenceEvent]:
        def ends():
            return {event.request_id: event for event in self.events if event.finish_reason}

        with self._changed:
            assert self._changed.wait_for(lambda: len(ends()) >= count, WAIT_S)
        return ends()


class Ended:
    """Collects the ids that the loop reports as ended."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, request_ids: list[str]) -> None:
        with self._changed:
            self.ids += request_ids
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ids) >= count, WAIT_S)
        return sorted(self.ids)


class CountingClock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self._now_s = 0

    def now(self) -> float:
        self._now_s += 1
        return self._now_s


def test_what_the_host_needs_between_two_steps_is_part_of_what_drafts_cost():
    limits = SchedulerLimits(
        num_pages=64, num_state_slots=8, max_model_len=256, max_running=8, step_token_budget=64
    )
    scheduler = Scheduler(limits, frozenset())
    observed: list[float] = []
    scheduler.observe_step = lambda plan, seconds: observed.append(seconds)
    loop, box = EngineLoop(scheduler, StubbornRunner(), CountingClock()), Box()
    loop.submit(make_request("r", range(5), max_tokens=4), (), box)
    loop.start()
    box.wait_for_ends(1)
    loop.stop()
    # The first from its launch to its end; the others from end to end: planning, launch, end.
    assert observed == [1, 3, 3, 3]


def test_events_of_a_verification_go_out_behind_the_launch_of_the_next_one():
    limits = SchedulerLimits(
        num_pages=64,
        num_state_slots=8,
        max_model_len=256,
        max_running=8,
        step_token_budget=64,
        max_draft_tokens=2,
    )
    guesser = Guesser(max_draft_tokens=2, on_device=True)
    runner, box = StubbornRunner(), Box()
    loop = EngineLoop(Scheduler(limits, frozenset(), guesser), runner, MonotonicClock(), run_ahead=1)
    num_launched: list[int] = []
    offer = box.offer

    def noting(events: list[SequenceEvent]) -> bool:
        num_launched.append(len(runner.plans))
        return offer(events)

    box.offer = noting
    loop.submit(make_request("r", range(5), max_tokens=20), (), box)
    loop.start()
    box.wait_for_ends(1)
    loop.stop()
    assert any(plan.num_verify_lines > 1 for plan in runner.plans)
    assert len(num_launched) == len(runner.plans)
    # The last has nothing to wait for.
    assert num_launched == [*range(2, len(runner.plans) + 1), len(runner.plans)]
    assert len([event.row for event in box.events if event.row]) == 20


def test_a_loop_that_breaks_before_a_launch_ends_everything_behind_what_it_held_back():
    limits = SchedulerLimits(
        num_pages=64,
        num_state_slots=8,
        max_model_len=256,
        max_running=8,
        step_token_budget=64,
        max_draft_tokens=2,
    )
    scheduler = Scheduler(limits, frozenset(), Guesser(max_draft_tokens=2, on_device=True))
    runner, ended, unhealthy = StubbornRunner(), Ended(), threading.Event()
    loop = EngineLoop(
        scheduler, runner, MonotonicClock(), run_ahead=1, on_ended=ended, on_unhealthy=unhealthy.set
    )
    full, box = Box(capacity=1), Box()
    commit = scheduler.commit

    def breaking(now):
        raise RuntimeError("no plan")

    def commit_and_break(plan, result):
        events = commit(plan, result)
        if plan.verify_rows:
            scheduler.plan = breaking
            scheduler.abort = lambda request_id: 1 / 0  # the books are wrong by now
        return events

    scheduler.commit = commit_and_break
    loop.submit(make_request("cut off", range(5), max_tokens=20), (), full)
    loop.submit(make_request("r", range(5), max_tokens=20), (), box)
    loop.start()
    assert box.wait_for_ends(1)["r"].error.code == "engine_failed"
    assert unhealthy.wait(WAIT_S)
    assert ended.wait_for(2) == ["cut off", "r"]
    assert len(box.batches) == 2
    (first, held) = box.batches
    assert len(first) == 1
    assert [event.row is None for event in held] == [*[False] * (len(held) - 1), True]
    assert len(held) > 1


class Rig:
    def __init__(self, run_ahead: int) -> None:
        limits = SchedulerLimits(
            num_pages=64, num_state_slots=8, max_model_len=256, max_running=8, step_token_budget=64
        )
        self.runner = StubbornRunner()
        self.ended = Ended()
        self.unhealthy = threading.Event()
        self.loop = EngineLoop(
            Scheduler(limits, frozenset()),
            self.runner,
            MonotonicClock(),
            run_ahead=run_ahead,
            on_ended=self.ended,
            on_unhealthy=self.unhealthy.set,
        )
        self.loop.start()


@pytest.fixture
def rig(run_ahead):
    rig = Rig(run_ahead)
    yield rig
    rig.runner.let_go()
    rig.loop.stop()


def test_one_batch_of_events_per_step_and_sink(rig):
    box = Box()
    rig.runner.hold()
    for name in ("a", "b"):
        rig.loop.submit(make_request(name, max_tokens=5), (), box)
    rig.runner.let_go()
    ends = box.wait_for_ends(2)
    assert {event.finish_reason for event in ends.values()} == {FinishReason.LENGTH}
    assert len(box.events) == 10
    assert max(len(batch) for batch in box.batches) == 2
    assert rig.ended.wait_for(2) == ["a", "b"]


def test_an_idle_loop_runs_no_steps(rig):
    box = Box()
    rig.loop.submit(make_request("a", max_tokens=3), (), box)
    box.wait_for_ends(1)
    num_steps = len(rig.runner.plans)
    # Whatever is called now runs on a loop that has nothing else to do.
    rig.loop.run_between_steps(lambda: None).result(WAIT_S)
    assert len(rig.runner.plans) == num_steps == 3


def test_a_failed_step_ends_only_its_own_requests(rig):
    box = Box()
    rig.runner.hold()
    rig.loop.submit(make_request("fails"), (), box)
    rig.runner.num_failures_left = 1
    rig.runner.let_go()
    failure = box.wait_for_ends(1)["fails"]
    assert failure.finish_reason is FinishReason.ERROR
    assert failure.error.code == "engine_failed"
    rig.loop.submit(make_request("works"), (), box)
    assert box.wait_for_ends(2)["works"].finish_reason is FinishReason.LENGTH
    assert rig.loop.is_healthy
    assert rig.loop.stats.num_pages_in_use == rig.loop.stats.num_pages_cached


def test_a_step_that_cannot_be_launched_does_not_take_the_one_before_along(rig):
    box = Box()
    rig.runner.hold_after(1)
    rig.loop.submit(make_request("a", max_tokens=5), (), box)
    rig.runner.fails_at_launch = True
    assert rig.runner.wait_until_held(WAIT_S)
    rig.runner.num_failures_left = 1
    rig.runner.let_go()
    assert box.wait_for_ends(1)["a"].error.code == "engine_failed"
    assert len([event for event in box.events if event.row]) == 1
    rig.loop.submit(make_request("works"), (), box)
    assert box.wait_for_ends(2)["works"].finish_reason is FinishReason.LENGTH


def test_a_step_whose_late_draw_fails_ends_only_its_own_requests(rig):
    box, failing = Box(), threading.Event()
    launch = rig.runner.launch

    class Undrawable:
        def draw(self):
            raise RuntimeError("the mask is on fire")

        def wait(self):
            raise AssertionError("nobody waits for what was not drawn")

    def launch_undrawable(plan):
        pending = launch(plan)
        return Undrawable() if failing.is_set() and plan.decode_rows else pending

    rig.runner.launch = launch_undrawable
    failing.set()
    rig.loop.submit(make_request("fails", max_tokens=6), (), box)
    assert box.wait_for_ends(1)["fails"].error.code == "engine_failed"
    failing.clear()
    rig.loop.submit(make_request("works"), (), box)
    assert box.wait_for_ends(2)["works"].finish_reason is FinishReason.LENGTH
    assert rig.loop.is_healthy


def test_a_request_is_let_go_after_the_last_step_that_works_on_it(run_ahead):
    history: list[str] = []
    is_over = threading.Event()

    class Witness(StubbornRunner):
        def launch(self, plan):
            pending = super().launch(plan)

            class Step:
                def draw(self):
                    pending.draw()

                def wait(self):
                    history.append(f"step {plan.step_id}")
                    return pending.wait()

            return Step()

    class Client:
        def offer(self, events):
            history.extend("end" for event in events if event.finish_reason)
            return True

    def on_ended(request_ids):
        history.append("let go")
        is_over.set()

    limits = SchedulerLimits(64, 8, max_model_len=256, max_running=8, step_token_budget=64)
    loop = EngineLoop(
        Scheduler(limits, frozenset()), Witness(), MonotonicClock(), run_ahead=run_ahead, on_ended=on_ended
    )
    loop.start()
    loop.submit(make_request("a", max_tokens=50, stop_token_ids=frozenset(range(100))), (), Client())
    assert is_over.wait(WAIT_S)
    loop.stop()
    in_turn = ["step 1", "end", "let go"]
    assert history == (["step 1", "end", "step 2", "let go"] if run_ahead else in_turn)


def test_what_runs_between_steps_finds_none_under_way(rig):
    box = Box()
    rig.runner.hold_after(3)
    rig.loop.submit(make_request("a", max_tokens=30), (), box)
    assert rig.runner.wait_until_held(WAIT_S)
    # Step 4 is being launched, and what was launched before it has not been taken in at depth 1.
    seen = rig.loop.run_between_steps(lambda: (len(rig.runner.plans), len(box.events)))
    rig.runner.let_go()
    assert seen.result(WAIT_S) == (4, 4)
    box.wait_for_ends(1)


def test_repeated_failures_make_the_engine_unhealthy(rig):
    box = Box()
    rig.runner.num_failures_left = 3
    for name in ("a", "b", "c"):
        rig.loop.submit(make_request(name), (), box)
        box.wait_for_ends(ord(name) - ord("a") + 1)
    assert rig.unhealthy.wait(WAIT_S)
    assert not rig.loop.is_healthy
    with pytest.raises(KilnError, match="restarted"):
        rig.loop.submit(make_request("d"), (), box)
    assert rig.ended.wait_for(3) == ["a", "b", "c"]


def test_nobody_waits_for_a_loop_that_broke(rig):
    """Whatever was left in the mailbox when the scheduler failed is answered too."""
    box = Box()
    rig.runner.hold()
    rig.loop.submit(make_request("running"), (), box)
    rig.loop.run_between_steps(lambda: None)
    rig.loop._scheduler.abort = lambda request_id: 1 / 0
    rig.loop.abort("running")
    rig.loop.submit(make_request("waiting"), (), box)
    rig.loop.abort("waiting")
    asked = rig.loop.run_between_steps(lambda: 5)
    rig.runner.let_go()
    assert rig.unhealthy.wait(WAIT_S)
    ends = box.wait_for_ends(2)
    assert {name: end.error.code for name, end in ends.items()} == {
        "running": "engine_failed",
        "waiting": "engine_failed",
    }
    with pytest.raises(KilnError, match="restarted"):
        asked.result(WAIT_S)
    assert rig.ended.wait_for(2) == ["running", "waiting"]


def test_a_full_sink_loses_its_requests_and_the_others_go_on(rig):
    slow, fast = Box(capacity=2), Box()
    rig.loop.submit(make_request("slow", max_tokens=200), (), slow)
    rig.loop.submit(make_request("fast", max_tokens=20), (), fast)
    assert fast.wait_for_ends(1)["fast"].finish_reason is FinishReason.LENGTH
    assert "slow" in rig.ended.wait_for(2)
    assert len(slow.events) == 2
    assert rig.loop.run_between_steps(lambda: rig.loop.stats.num_running).result(WAIT_S) == 0


def test_an_abort_takes_effect_at_the_next_step_boundary(rig):
    box = Box()
    rig.runner.hold()
    rig.loop.submit(make_request("a", max_tokens=200), (), box)
    rig.loop.abort("a")
    rig.loop.abort("unknown")
    rig.runner.let_go()
    assert box.wait_for_ends(1)["a"].finish_reason is FinishReason.ABORT
    assert len(box.events) <= 2


def test_a_refused_request_hears_why(rig):
    box = Box()
    rig.loop.submit(make_request("long", range(300)), (), box)
    assert box.wait_for_ends(1)["long"].error.code == "prompt_too_long"
    assert rig.ended.wait_for(1) == ["long"]


def test_a_duplicate_id_leaves_the_first_request_alone(rig):
    first, second = Box(), Box()
    rig.runner.hold()
    rig.loop.submit(make_request("a", max_tokens=6), (), first)
    rig.loop.submit(make_request("a", max_tokens=6), (), second)
    rig.runner.let_go()
    assert second.wait_for_ends(1)["a"].error.code == "duplicate_request_id"
    assert first.wait_for_ends(1)["a"].finish_reason is FinishReason.LENGTH
    assert rig.ended.wait_for(1) == ["a"]


def test_stopping_ends_every_request(rig):
    box = Box()
    rig.runner.hold()
    rig.loop.submit(make_request("a", max_tokens=200), (), box)
    stopper = threading.Thread(target=rig.loop.stop)
    stopper.start()
    rig.runner.let_go()
    stopper.join(WAIT_S)
    assert box.wait_for_ends(1)["a"].error.code == "engine_draining"
    with pytest.raises(KilnError, match="stopped"):
        rig.loop.submit(make_request("b"), (), box)
    with pytest.raises(KilnError, match="stopped"):
        rig.loop.run_between_steps(lambda: None).result(WAIT_S)


def test_what_runs_between_steps_may_fail_alone(rig):
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        rig.loop.run_between_steps(fail).result(WAIT_S)
    assert rig.loop.run_between_steps(lambda: 5).result(WAIT_S) == 5
