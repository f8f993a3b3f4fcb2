"""Requests that wait for an adapter: others pass them, and each of their ends leaves nothing behind."""

import asyncio
import contextlib
from collections import Counter

import pytest

from kiln_common.errors import KilnError, RegistryUnavailable
from kiln_common.pb import common_pb2, engine_pb2
from kiln_engine.clock import MonotonicClock
from kiln_engine.domain import FinishReason, SequenceEvent
from kiln_engine.domain.adapter import AdapterLease, AdapterVersion
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from kiln_engine.servicer.intake import RequestIntake
from kiln_engine.servicer.outbox import Outbox
from kiln_engine.servicer.validation import RequestLimits
from tests.support.engine_server import StubbornRunner, generate_request

ADAPTER = common_pb2.AdapterRef(name="a", version=1, sha256="ab" * 32, scale=0.5)


class SlowAdapters:
    """An AdapterResidency that answers when it is told to, and counts what is held."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.num_held = 0
        self.error: Exception | None = None
        self.resident = []

    async def acquire(self, versions) -> AdapterLease:
        await self.may_answer.wait()
        if self.error:
            raise self.error
        self.num_held += 1
        return AdapterLease(tuple(versions), (3,) * len(versions))

    def release(self, lease: AdapterLease) -> None:
        self.num_held -= 1

    def newest(self, name: str) -> AdapterVersion | None:
        return None

    async def prepare(self, version: AdapterVersion) -> tuple[int, bool]:
        raise NotImplementedError


class Rig:
    def __init__(self, adapters: SlowAdapters | None = None) -> None:
        limits = SchedulerLimits(
            num_pages=64, num_state_slots=8, max_model_len=256, max_running=4, step_token_budget=64
        )
        self.runner = StubbornRunner()
        self.adapters = adapters or SlowAdapters()
        clock = MonotonicClock()
        self.loop = EngineLoop(
            Scheduler(limits, frozenset()), self.runner, clock, on_ended=lambda ids: self.intake.ended(ids)
        )
        self.intake = RequestIntake(self.loop, self.adapters, RequestLimits(100, 256), clock)
        self.outbox = Outbox(1000)

    async def end_of(self, request_id: str) -> SequenceEvent:
        """The request's last event; other requests' events are passed over."""
        async with asyncio.timeout(60):
            while True:
                for event in await self.outbox.take():
                    if event.request_id == request_id and event.finish_reason:
                        return event

    async def until_empty(self) -> None:
        async with asyncio.timeout(60):
            while self.intake.num_live:
                await asyncio.sleep(0.002)


@pytest.fixture
async def rig():
    rig = Rig()
    rig.loop.start()
    yield rig
    rig.runner.let_go()
    with contextlib.suppress(TimeoutError):
        await rig.intake.drain(0.01)
    await asyncio.to_thread(rig.loop.stop)


async def test_others_pass_a_request_that_waits_for_its_adapter(rig):
    rig.intake.submit(generate_request("waits", adapters=[ADAPTER]), rig.outbox)
    rig.intake.submit(generate_request("passes"), rig.outbox)
    assert (await rig.end_of("passes")).finish_reason is FinishReason.LENGTH
    assert rig.intake.num_preparing == 1
    rig.adapters.may_answer.set()
    assert (await rig.end_of("waits")).finish_reason is FinishReason.LENGTH
    assert rig.runner.plans[-1].decode_rows[0].adapter_slots == ((3, 0.5),)


async def test_an_adapter_is_held_until_its_request_has_ended(rig):
    rig.adapters.may_answer.set()
    rig.runner.hold_after(2)
    rig.intake.submit(generate_request("r", adapters=[ADAPTER], max_tokens=5), rig.outbox)
    await rig.outbox.take()
    assert rig.adapters.num_held == 1
    rig.runner.let_go()
    await rig.until_empty()
    assert rig.adapters.num_held == 0


async def test_an_abort_ends_a_waiting_request_at_once(rig):
    rig.intake.submit(generate_request("r", adapters=[ADAPTER]), rig.outbox)
    await asyncio.sleep(0)
    rig.intake.abort("r", rig.outbox)
    assert (await rig.end_of("r")).finish_reason is FinishReason.ABORT
    rig.adapters.may_answer.set()
    await rig.until_empty()
    assert rig.adapters.num_held == 0
    assert rig.runner.plans == []


async def test_only_its_own_sink_can_abort_a_request(rig):
    rig.intake.submit(generate_request("r", adapters=[ADAPTER]), rig.outbox)
    rig.intake.abort("r", Outbox(1))
    assert rig.intake.num_live == 1


async def test_a_deadline_passes_while_the_adapter_is_fetched(rig):
    rig.intake.submit(generate_request("r", adapters=[ADAPTER], timeout_s=0.01), rig.outbox)
    assert (await rig.end_of("r")).error.code == "deadline_exceeded"
    assert rig.intake.num_live == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RegistryUnavailable("gone"), "registry_unavailable"),
        (RuntimeError("the device has no memory"), "adapter_unavailable"),
    ],
)
async def test_an_adapter_that_cannot_come_ends_its_request(rig, error, code):
    rig.adapters.error = error
    rig.adapters.may_answer.set()
    rig.intake.submit(generate_request("r", adapters=[ADAPTER]), rig.outbox)
    assert (await rig.end_of("r")).error.code == code
    assert rig.intake.num_live == 0


async def test_a_drain_hands_back_what_still_waits_for_an_adapter(rig):
    rig.intake.submit(generate_request("r", adapters=[ADAPTER]), rig.outbox)
    assert await rig.intake.drain(0.01) == (0, 1)
    assert (await rig.end_of("r")).error.code == "answer_handed_back"
    with pytest.raises(KilnError, match="being stopped"):
        rig.intake.submit(generate_request("late"), rig.outbox)


async def test_a_second_drain_hands_back_sooner(rig):
    rig.intake.submit(generate_request("r", max_tokens=200), rig.outbox)
    rig.runner.hold_after(3)
    patient = asyncio.create_task(rig.intake.drain(600.0))
    await asyncio.sleep(0)
    hurried = asyncio.create_task(rig.intake.drain(0.0))
    async with asyncio.timeout(60):
        while not rig.intake._num_handed_back:  # or the request might end by itself first
            await asyncio.sleep(0)
    rig.runner.let_go()
    assert (await rig.end_of("r")).error.code == "answer_handed_back"
    assert await hurried == (0, 1)
    async with asyncio.timeout(60):
        assert await patient == (0, 1)


def sha256_of(version: int) -> str:
    return ADAPTER.sha256 if version == ADAPTER.version else f"{version:064x}"


class TwoVersions(SlowAdapters):
    """Version n is in slot n; what is held is counted by version."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer.set()
        self.held: Counter[int] = Counter()
        self.newest_version = 1

    async def acquire(self, versions) -> AdapterLease:
        if self.error:
            raise self.error
        self.held.update(version.version for version in versions)
        return AdapterLease(tuple(versions), tuple(version.version for version in versions))

    def release(self, lease: AdapterLease) -> None:
        self.held.subtract(version.version for version in lease.adapters)

    def newest(self, name: str) -> AdapterVersion | None:
        return AdapterVersion(name, self.newest_version, sha256_of(self.newest_version))


@pytest.fixture
async def moving():
    rig = Rig(TwoVersions())
    rig.loop.start()
    yield rig
    rig.runner.let_go()
    await asyncio.to_thread(rig.loop.stop)


async def until_nothing_is_held(rig: Rig) -> None:
    """A move that the end of its request overtook gives back what it held a moment later."""
    await rig.until_empty()
    async with asyncio.timeout(60):
        while +rig.adapters.held:
            await asyncio.sleep(0.002)


def publish_second(rig: Rig) -> None:
    rig.adapters.newest_version = 2
    rig.intake.follow(rig.adapters.newest("a"))


LATEST = engine_pb2.ADAPTER_POLICY_LATEST


async def test_requests_that_follow_a_name_move_together_and_the_others_stay(moving):
    for name in ("follows", "follows too"):
        request = generate_request(name, adapters=[ADAPTER], max_tokens=50, adapter_policy=LATEST)
        moving.intake.submit(request, moving.outbox)
    moving.intake.submit(generate_request("stays", adapters=[ADAPTER], max_tokens=50), moving.outbox)
    moving.runner.hold_after(6)
    assert await asyncio.to_thread(moving.runner.wait_until_held, 60)
    assert moving.adapters.held[1] == 3
    publish_second(moving)
    while moving.adapters.held[2] < 2:  # then the move is in the loop's mailbox
        await asyncio.sleep(0)
    moving.runner.let_go()
    await moving.until_empty()
    slots = [[row.adapter_slots for row in plan.decode_rows] for plan in moving.runner.plans]
    first = next(rows for rows in slots if ((2, 0.5),) in rows)
    assert sorted(first) == [((1, 0.5),), ((2, 0.5),), ((2, 0.5),)]
    assert +moving.adapters.held == Counter()


async def test_a_request_that_follows_a_name_goes_back_with_it(moving):
    moving.adapters.newest_version = 2
    later = common_pb2.AdapterRef(name="a", version=2, sha256=sha256_of(2), scale=0.5)
    request = generate_request("r", adapters=[later], max_tokens=50, adapter_policy=LATEST)
    moving.intake.submit(request, moving.outbox)
    moving.runner.hold_after(6)
    assert await asyncio.to_thread(moving.runner.wait_until_held, 60)
    moving.adapters.newest_version = 1
    moving.intake.follow(moving.adapters.newest("a"))
    while moving.adapters.held[1] < 1:  # then the move is in the loop's mailbox
        await asyncio.sleep(0)
    moving.runner.let_go()
    assert (await moving.end_of("r")).finish_reason is FinishReason.LENGTH
    slots = [row.adapter_slots for plan in moving.runner.plans for row in plan.decode_rows]
    assert (slots[0], slots[-1]) == (((2, 0.5),), ((1, 0.5),))
    await until_nothing_is_held(moving)


async def test_a_request_moves_on_to_what_came_while_it_waited(moving):
    moving.adapters.newest_version = 2
    request = generate_request("r", adapters=[ADAPTER], max_tokens=200, adapter_policy=LATEST)
    moving.intake.submit(request, moving.outbox)
    assert (await moving.end_of("r")).finish_reason is FinishReason.LENGTH
    assert moving.runner.plans[-1].decode_rows[0].adapter_slots == ((2, 0.5),)
    await until_nothing_is_held(moving)


async def test_a_version_that_cannot_be_had_leaves_the_request_where_it_is(moving):
    moving.runner.hold_after(3)
    request = generate_request("r", adapters=[ADAPTER], max_tokens=20, adapter_policy=LATEST)
    moving.intake.submit(request, moving.outbox)
    assert await asyncio.to_thread(moving.runner.wait_until_held, 60)
    moving.adapters.error = RegistryUnavailable("gone")
    publish_second(moving)
    moving.runner.let_go()
    assert (await moving.end_of("r")).finish_reason is FinishReason.LENGTH
    assert moving.runner.plans[-1].decode_rows[0].adapter_slots == ((1, 0.5),)
    await until_nothing_is_held(moving)


async def test_a_policy_that_does_not_exist_is_refused(moving):
    with pytest.raises(KilnError, match="adapter_policy"):
        moving.intake.submit(generate_request("r", adapters=[ADAPTER], adapter_policy=7), moving.outbox)
