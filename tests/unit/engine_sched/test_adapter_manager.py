"""The manager with a real loop on its thread, a source that can be held, and a store that records."""

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from types import SimpleNamespace

import pytest

from kiln_common.clients.registry import BlobCorrupt
from kiln_common.ending import end_tasks
from kiln_common.errors import AdapterNotFound, KilnError, RegistryUnavailable
from kiln_common.pb.registry_pb2 import AdapterVersion as AdapterRecord
from kiln_engine.adapters.manager import AdapterManager
from kiln_engine.adapters.publications import Publications
from kiln_engine.adapters.slots import AdapterSlots
from kiln_engine.clock import MonotonicClock
from kiln_engine.domain.adapter import AdapterVersion, Rollback
from kiln_engine.domain.errors import AdapterUnavailable
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from tests.support.engine_server import RecordingStore, StubbornRunner


def version_of(name: str, version: int = 1) -> AdapterVersion:
    return AdapterVersion(name, version, hashlib.sha256(content_of(name, version)).hexdigest())


def content_of(name: str, version: int) -> bytes:
    return f"{name}@{version}".encode()


class Source:
    """A registry in memory."""

    def __init__(self) -> None:
        self.error: KilnError | None = None
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.may_resolve = asyncio.Event()
        self.may_resolve.set()
        self.has_been_asked = asyncio.Event()
        self.num_fetches = 0
        self.is_corrupt = False

    async def resolve(self, reference: str):
        self.has_been_asked.set()
        await self.may_resolve.wait()
        if self.error:
            raise self.error
        name, _, number = reference.partition("@")
        return SimpleNamespace(sha256=version_of(name, int(number)).sha256, config_json="{}")

    async def fetch(self, sha256: str) -> bytes:
        self.num_fetches += 1
        await self.is_open.wait()
        known = [content_of(name, number) for name in "abcde" for number in (1, 2, 3)]
        content = next(c for c in known if hashlib.sha256(c).hexdigest() == sha256)
        if self.is_corrupt:
            raise BlobCorrupt(f"asked for {sha256}, got the hash of something else")
        return content


@contextlib.asynccontextmanager
async def running_manager(num_slots: int = 2, slot_wait_s: float = 0.05):
    limits = SchedulerLimits(
        num_pages=8, num_state_slots=4, max_model_len=64, max_running=2, step_token_budget=32
    )
    loop = EngineLoop(Scheduler(limits, frozenset()), StubbornRunner(), MonotonicClock())
    loop.start()
    store, source = RecordingStore(), Source()
    manager = AdapterManager(AdapterSlots(num_slots), store, source, loop, slot_wait_s=slot_wait_s)
    try:
        yield manager, store, source
    finally:
        await manager.close()
        loop.stop()


async def test_a_version_is_staged_then_activated_on_the_loop_thread():
    async with running_manager() as (manager, store, _):
        assert await manager.prepare(version_of("a")) == (1, True)
        assert store.history == [("stage", 1, b"a@1"), ("activate", 1)]
        assert store.threads == {"engine-loop"}
        assert await manager.prepare(version_of("a")) == (1, False)
        assert len(store.history) == 2


async def test_requests_for_one_version_share_its_fetch():
    async with running_manager() as (manager, _, source):
        leases = await asyncio.gather(*(manager.acquire([version_of("a")]) for _ in range(5)))
        assert source.num_fetches == 1
        assert manager.resident[0].num_pins == 5
        for lease in leases:
            manager.release(lease)
        assert manager.resident[0].num_pins == 0


async def test_an_evicted_version_is_cleared_before_its_slot_is_filled():
    async with running_manager(num_slots=1) as (manager, store, _):
        await manager.prepare(version_of("a"))
        await manager.prepare(version_of("b"))
        assert store.history[2:] == [("clear", 1), ("stage", 1, b"b@1"), ("activate", 1)]


async def test_when_every_slot_is_pinned_a_request_waits_for_one():
    async with running_manager(num_slots=1, slot_wait_s=10) as (manager, _, _):
        lease = await manager.acquire([version_of("a")])
        waiting = asyncio.create_task(manager.acquire([version_of("b")]))
        await asyncio.sleep(0)
        assert not waiting.done()
        manager.release(lease)
        assert (await waiting).slots == (1,)


async def test_a_request_does_not_wait_for_a_slot_forever():
    async with running_manager(num_slots=1) as (manager, _, _):
        await manager.acquire([version_of("a")])
        with pytest.raises(KilnError, match=r"stayed in use") as caught:
            await manager.acquire([version_of("b")])
        assert caught.value.code == "adapter_slots_full"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterNotFound("no such adapter"), "adapter_not_found"),
        (RegistryUnavailable("gone"), "adapter_unavailable"),
    ],
)
async def test_a_failed_fetch_names_its_code_and_leaves_nothing_behind(error, code):
    async with running_manager(num_slots=1) as (manager, _, source):
        source.error = error
        with pytest.raises(KilnError) as caught:
            await manager.acquire([version_of("a")])
        assert caught.value.code == code
        source.error = None
        assert (await manager.acquire([version_of("a")])).slots == (1,)


async def test_a_version_that_does_not_come_leaves_the_slot_it_was_given_empty():
    async with running_manager(num_slots=1) as (manager, store, source):
        await manager.prepare(version_of("a"))
        source.error = RegistryUnavailable("gone")
        with pytest.raises(KilnError):
            await manager.prepare(version_of("b"))
        source.error = None
        for name in ("b", "a"):
            assert await manager.prepare(version_of(name)) == (1, True)
        assert [entry[0] for entry in store.history].count("clear") == 2


async def test_corrupt_bytes_are_refused():
    async with running_manager() as (manager, store, source):
        source.is_corrupt = True
        with pytest.raises(AdapterUnavailable, match="hash"):
            await manager.acquire([version_of("a")])
        assert store.history == []


async def test_a_hash_the_version_does_not_have_is_not_found():
    async with running_manager() as (manager, _, _):
        with pytest.raises(AdapterNotFound):
            await manager.acquire([AdapterVersion("a", 1, version_of("b").sha256)])


async def test_a_composition_pins_all_or_none():
    async with running_manager(num_slots=2) as (manager, _, source):
        await manager.prepare(version_of("a"))
        source.error = RegistryUnavailable("gone")
        with pytest.raises(KilnError):
            await manager.acquire([version_of("a"), version_of("b")])
        assert manager.resident[0].num_pins == 0


async def test_a_cancelled_request_leaves_no_pin_and_the_fetch_goes_on():
    async with running_manager() as (manager, _, source):
        source.is_open.clear()
        waiting = asyncio.create_task(manager.acquire([version_of("a")]))
        while source.num_fetches == 0:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        source.is_open.set()
        assert await manager.prepare(version_of("a")) == (1, True)
        assert manager.resident[0].num_pins == 0
        assert source.num_fetches == 1


async def test_a_new_version_retires_the_old_one_which_then_gives_way_first():
    async with running_manager(num_slots=3) as (manager, store, _):
        for version in (version_of("a", 1), version_of("b"), version_of("a", 2)):
            await manager.prepare(version)
        old = next(entry for entry in manager.resident if entry.adapter.reference == "a@1")
        await manager.prepare(version_of("c"))
        assert ("clear", old.slot) in store.history


async def hand_over(manager: AdapterManager, name: str = "a", config_json: str = "{}") -> str:
    return await manager.receive(name, memoryview(content_of(name, 1)), config_json)


async def test_bytes_that_came_ahead_serve_from_the_commit_on_without_a_fetch():
    async with running_manager() as (manager, store, source):
        assert await hand_over(manager) == version_of("a").sha256
        assert [entry[:2] for entry in store.history] == [("stage", 1), ("activate", 1)]
        assert manager.resident == []
        assert await manager.prepare(version_of("a")) == (1, True)
        assert len(store.history) == 2  # nothing is left to do but to give out the slot
        assert [entry.adapter for entry in manager.resident] == [version_of("a")]
        assert source.num_fetches == 0


async def test_bytes_that_came_ahead_wait_until_the_registry_has_the_version():
    async with running_manager() as (manager, _, source):
        await hand_over(manager)
        source.error = AdapterNotFound("not yet")
        with pytest.raises(AdapterNotFound):
            await manager.acquire([version_of("a")])
        assert manager.resident == []
        source.error = None
        assert await manager.prepare(version_of("a")) == (1, True)
        assert source.num_fetches == 0


async def test_other_bytes_than_the_published_ones_never_serve():
    async with running_manager() as (manager, store, source):
        await manager.prepare(version_of("a", 1))
        await manager.receive("a", memoryview(b"damaged on the way"), "{}")
        old = await manager.acquire([version_of("a", 1)])
        await manager.prepare(version_of("a", 2))
        assert store.history[-2:] == [("stage", 2, content_of("a", 2)), ("activate", 2)]
        assert source.num_fetches == 2
        assert old.slots == (1,)


async def test_bytes_that_came_with_another_config_are_staged_again_with_the_published_one():
    async with running_manager() as (manager, store, source):
        await hand_over(manager, config_json='{"lora_alpha": 64}')
        await manager.prepare(version_of("a"))
        assert [entry[0] for entry in store.history] == [
            *["stage", "activate"],
            "clear",
            *["stage", "activate"],
        ]
        assert source.num_fetches == 1


async def test_bytes_that_nobody_asked_for_give_way():
    async with running_manager(num_slots=1) as (manager, store, _):
        await hand_over(manager, "a")
        await manager.prepare(version_of("b"))
        assert [entry[0] for entry in store.history] == [
            *["stage", "activate"],
            "clear",
            *["stage", "activate"],
        ]
        # And are fetched when somebody does.
        assert await manager.prepare(version_of("a")) == (1, True)


async def test_the_same_bytes_come_twice_at_no_cost():
    async with running_manager() as (manager, store, _):
        await hand_over(manager)
        await hand_over(manager)
        assert len(store.history) == 2


async def test_bytes_that_the_store_refuses_leave_the_slot_free():
    async with running_manager(num_slots=1) as (manager, store, _):
        store.stage, stage = lambda *_: raise_error(AdapterUnavailable("not an adapter")), store.stage
        with pytest.raises(AdapterUnavailable):
            await hand_over(manager, "a")
        store.stage = stage
        assert await manager.prepare(version_of("b")) == (1, True)


def raise_error(error: Exception):
    raise error


async def test_a_slot_whose_commit_is_asked_about_does_not_give_way():
    async with running_manager(num_slots=1) as (manager, _, source):
        await hand_over(manager)
        source.may_resolve.clear()
        asking = asyncio.create_task(manager.acquire([version_of("a")]))
        await source.has_been_asked.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        with pytest.raises(KilnError, match="stayed in use"):
            await manager.acquire([version_of("b")])
        source.may_resolve.set()
        assert (await manager.prepare(version_of("a")))[0] == 1
        assert source.num_fetches == 0


async def test_bytes_with_another_config_whose_right_ones_do_not_come_leave_the_slot_empty():
    async with running_manager(num_slots=1) as (manager, store, source):
        await hand_over(manager, config_json='{"lora_alpha": 64}')
        source.is_corrupt = True
        with pytest.raises(AdapterUnavailable):
            await manager.prepare(version_of("a"))
        source.is_corrupt = False
        assert await manager.prepare(version_of("a")) == (1, True)
        assert [entry[0] for entry in store.history] == [
            *["stage", "activate"],
            "clear",
            *["stage", "activate"],
        ]


async def test_a_name_that_was_rolled_back_means_the_older_version_until_a_newer_one_comes():
    async with running_manager(num_slots=3) as (manager, _, _):
        first, second, third = (version_of("a", number) for number in (1, 2, 3))
        for version in (first, second):
            await manager.prepare(version)
        told = []
        manager.on_resident = told.append
        assert manager.newest("a") == second
        await manager.turn_back(Rollback(first, passed_over=2))
        assert (manager.newest("a"), told) == (first, [first])
        # The version it was rolled back from goes first now.
        manager.release(await manager.acquire([version_of("b"), version_of("c")]))
        assert second not in [entry.adapter for entry in manager.resident]
        await manager.turn_back(Rollback(second, passed_over=2))  # and forward again
        assert manager.newest("a") == second
        await manager.prepare(third)
        assert manager.newest("a") == third


async def test_a_rollback_to_a_version_that_left_the_device_brings_it_back():
    async with running_manager() as (manager, _, source):
        await manager.prepare(version_of("a", 2))
        source.is_open.clear()
        turning = asyncio.create_task(manager.turn_back(Rollback(version_of("a"), passed_over=2)))
        await asyncio.sleep(0)
        assert manager.newest("a") is None  # nobody is moved to what cannot serve yet
        source.is_open.set()
        await turning
        assert manager.newest("a") == version_of("a")


async def test_bytes_that_are_published_again_serve_as_the_later_version():
    async with running_manager() as (manager, _, source):
        await manager.prepare(version_of("a"))
        again = AdapterVersion("a", 7, version_of("a").sha256)
        assert await manager.prepare(again) == (1, False)
        assert (manager.newest("a"), source.num_fetches) == (again, 1)


async def test_the_same_bytes_under_another_name_are_that_names_newest_version():
    """A candidate that passed its gate is published under the name it was trained for."""
    candidate = version_of("a")
    published = AdapterVersion("helper", 7, candidate.sha256)
    heard = []
    async with running_manager() as (manager, _, source):
        manager.on_resident = heard.append
        await manager.prepare(candidate)
        assert await manager.prepare(published) == (1, False)
        assert manager.newest("helper") == published
        assert manager.newest("a") is None
        assert source.num_fetches == 1
    assert heard == [candidate, published]


async def test_the_registrys_own_word_lets_what_came_ahead_serve_without_asking_it():
    async with running_manager() as (manager, store, source):
        sha256 = await hand_over(manager)
        await manager.take_over(AdapterRecord(name="a", version=1, sha256=sha256, config_json="{}"))
        assert [entry.adapter for entry in manager.resident] == [version_of("a")]
        assert len(store.history) == 2
        assert not source.has_been_asked.is_set()
        assert await manager.prepare(version_of("a")) == (1, False)


async def test_a_word_about_bytes_that_gave_way_fetches_nothing():
    async with running_manager() as (manager, store, source):
        sha256 = version_of("a").sha256
        await manager.take_over(AdapterRecord(name="a", version=1, sha256=sha256, config_json="{}"))
        assert (manager.resident, store.history, source.num_fetches) == ([], [], 0)


async def test_a_word_with_another_config_has_the_bytes_staged_again():
    async with running_manager() as (manager, store, source):
        sha256 = await hand_over(manager, config_json='{"lora_alpha": 64}')
        await manager.take_over(AdapterRecord(name="a", version=1, sha256=sha256, config_json="{}"))
        assert [entry[0] for entry in store.history] == ["stage", "activate", "clear", "stage", "activate"]
        assert source.num_fetches == 1


class Notice:
    """A registry that says what is committed when it is told to."""

    def __init__(self) -> None:
        running = asyncio.get_running_loop()
        self.coming: dict[tuple[str, str], asyncio.Future] = defaultdict(running.create_future)

    async def await_publish(self, name: str, sha256: str, *, timeout_s: float):
        return await self.coming[name, sha256]


async def test_what_was_handed_over_serves_from_the_commit_on_though_nobody_asks_for_it():
    async with running_manager() as (manager, _, source):
        is_serving = asyncio.Event()
        manager.on_resident = lambda version: is_serving.set()
        notice = Notice()
        publications = Publications(notice, manager)
        manager.on_ahead = publications.expect
        running = asyncio.create_task(publications.run())
        for name in ("b", "a"):
            await hand_over(manager, name)
        assert manager.resident == []
        # One that is not published does not stop the others.
        notice.coming["b", version_of("b").sha256].set_exception(RegistryUnavailable("it went away"))
        record = AdapterRecord(name="a", version=1, sha256=version_of("a").sha256, config_json="{}")
        notice.coming["a", record.sha256].set_result(record)
        await is_serving.wait()
        assert [entry.adapter for entry in manager.resident] == [version_of("a")]
        assert not source.has_been_asked.is_set()
        await end_tasks(running)


async def test_the_word_may_come_while_the_bytes_are_still_on_their_way():
    async with running_manager() as (manager, store, source):
        taken = []

        def take_over_at_once(name: str, sha256: str) -> None:
            record = AdapterRecord(name=name, version=1, sha256=sha256, config_json="{}")
            taken.append(asyncio.create_task(manager.take_over(record)))

        manager.on_ahead = take_over_at_once
        await hand_over(manager)
        await asyncio.gather(*taken)
        assert [entry.adapter for entry in manager.resident] == [version_of("a")]
        assert [entry[0] for entry in store.history] == ["stage", "activate"]
        assert not source.has_been_asked.is_set()
