"""What the engine fetches because the registry points at it, with nobody telling it so."""

import asyncio
import contextlib
import hashlib

from kiln_common.errors import AdapterNotFound, InvalidRequest, RegistryUnavailable
from kiln_common.pb import registry_pb2
from kiln_engine.adapters.manager import AdapterManager
from kiln_engine.adapters.refresh import AdapterRefresh
from kiln_engine.adapters.slots import AdapterSlots
from kiln_engine.clock import MonotonicClock
from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from tests.support.engine_server import RecordingStore, StubbornRunner

MODEL_HASH = "ab" * 32


class Registry:
    """Names, versions and a default in memory; counts what is fetched."""

    def __init__(self) -> None:
        self.versions: dict[str, registry_pb2.AdapterVersion] = {}
        self.latest: dict[str, str] = {}
        self.default = ""
        self.error = None
        self.fetch_error = None
        self.fetched: list[str] = []

    def publish(self, name, version, *, model_hash=MODEL_HASH, attach=False):
        reference = f"{name}@{version}"
        self.versions[reference] = registry_pb2.AdapterVersion(
            name=name,
            version=version,
            sha256=hashlib.sha256(reference.encode()).hexdigest(),
            base_model_hash=model_hash,
        )
        self.latest[name] = reference
        if attach:
            self.default = reference

    async def get_default(self):
        if self.error:
            raise self.error
        return self.versions.get(self.default)

    async def resolve(self, reference):
        if self.error:
            raise self.error
        found = self.versions.get(self.latest.get(reference, reference))
        if found is None:
            raise AdapterNotFound(f"there is no {reference}")
        return found

    async def fetch(self, sha256):
        [reference] = [name for name, record in self.versions.items() if record.sha256 == sha256]
        self.fetched.append(reference)
        if self.fetch_error:
            raise self.fetch_error
        return reference.encode()


class RefusingStore(RecordingStore):
    def stage(self, slot, adapter_bytes, config_json):
        raise InvalidRequest("not an adapter")


@contextlib.asynccontextmanager
async def running(num_slots=2, interval_s=60.0, store=None):
    limits = SchedulerLimits(
        num_pages=8, num_state_slots=4, max_model_len=64, max_running=2, step_token_budget=32
    )
    loop = EngineLoop(Scheduler(limits, frozenset()), StubbornRunner(), MonotonicClock())
    loop.start()
    registry = Registry()
    manager = AdapterManager(
        AdapterSlots(num_slots), store or RecordingStore(), registry, loop, slot_wait_s=0.05
    )
    try:
        yield AdapterRefresh(registry, manager, MODEL_HASH, interval_s), registry, manager
    finally:
        await manager.close()
        loop.stop()


def on_device(manager):
    return {entry.adapter.reference for entry in manager.resident}


async def test_the_attached_default_is_fetched():
    async with running() as (refresh, registry, manager):
        await refresh.look()
        assert on_device(manager) == set()
        registry.publish("a", 1, attach=True)
        registry.publish("b", 1)
        await refresh.look()
        assert on_device(manager) == {"a@1"}
        registry.publish("b", 2, attach=True)
        await refresh.look()
        assert on_device(manager) == {"a@1", "b@2"}


async def test_names_on_the_device_follow_what_they_mean_now():
    async with running() as (refresh, registry, manager):
        registry.publish("a", 1, attach=True)
        await refresh.look()
        registry.publish("a", 2)
        await refresh.look()
        assert on_device(manager) == {"a@1", "a@2"}


async def test_it_goes_on_when_the_registry_is_back():
    async with running(interval_s=0.01) as (refresh, registry, manager):
        registry.publish("a", 1, attach=True)
        registry.error = RegistryUnavailable("gone")
        await refresh.look()
        assert on_device(manager) == set()
        task = asyncio.create_task(refresh.run())
        registry.error = None
        async with asyncio.timeout(60):
            while not on_device(manager):
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_default_that_gave_way_to_busier_versions_does_not_push_them_out_again():
    async with running(num_slots=1) as (refresh, registry, manager):
        registry.publish("a", 1, attach=True)
        registry.publish("b", 1)
        await refresh.look()
        manager.release(await manager.acquire([_version(registry, "b@1")]))
        await refresh.look()
        await refresh.look()
        assert on_device(manager) == {"b@1"}
        assert registry.fetched == ["a@1", "b@1"]


async def test_a_passing_failure_is_tried_again():
    async with running() as (refresh, registry, manager):
        registry.publish("a", 1, attach=True)
        registry.fetch_error = RegistryUnavailable("gone")
        await refresh.look()
        assert on_device(manager) == set()
        registry.fetch_error = None
        await refresh.look()
        assert on_device(manager) == {"a@1"}


async def test_a_version_the_device_refuses_is_not_fetched_again():
    async with running(store=RefusingStore()) as (refresh, registry, _):
        registry.publish("a", 1, attach=True)
        await refresh.look()
        await refresh.look()
        assert registry.fetched == ["a@1"]


async def test_a_deleted_name_does_not_hide_the_default():
    async with running() as (refresh, registry, manager):
        registry.publish("a", 1, attach=True)
        await refresh.look()
        del registry.latest["a"], registry.versions["a@1"]
        registry.publish("b", 1, attach=True)
        await refresh.look()
        assert on_device(manager) == {"a@1", "b@1"}


async def test_adapters_of_another_base_model_are_left_alone():
    async with running() as (refresh, registry, manager):
        registry.publish("a", 1, model_hash="cd" * 32, attach=True)
        await refresh.look()
        assert on_device(manager) == set()
        assert registry.fetched == []


def _version(registry, reference):
    record = registry.versions[reference]
    return AdapterVersion(record.name, record.version, record.sha256)


async def test_a_rollback_that_nobody_told_of_is_found():
    async with running(num_slots=3) as (refresh, registry, manager):
        for version in (1, 2):
            registry.publish("a", version)
            record = registry.versions[f"a@{version}"]
            await manager.prepare(AdapterVersion("a", version, record.sha256))
        await refresh.look()
        assert manager.newest("a").version == 2
        registry.latest["a"] = "a@1"
        registry.versions["a@1"].rolled_back_over = 2
        await refresh.look()
        assert manager.newest("a").version == 1
