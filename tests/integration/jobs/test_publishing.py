"""A trained adapter on its way: bytes to engines and registry side by side, served from the commit on."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import registry_pb2
from kiln_nn.lora import LoraSpec
from kiln_nn.sharing import AdapterInbox, HandedAdapter, SealedAdapter
from kiln_trainer.publishing import EngineDirectory, GrpcPublisher
from tests.support.fake_engine import running_engine
from tests.support.tiny_models import random_adapter, tiny_config

SPEC = LoraSpec(rank=2, alpha=4.0)


def sealed() -> SealedAdapter:
    return SealedAdapter(random_adapter(tiny_config(), SPEC), SPEC, "tiny")


class Registry:
    """Numbers versions and hashes what it gets; its answer waits until `may_commit`."""

    def __init__(self) -> None:
        self.may_commit = asyncio.Event()
        self.may_commit.set()
        self.num_fetches = 0
        self.is_away = False

    async def publish(self, header, content) -> registry_pb2.AdapterVersion:
        if self.is_away:
            raise RegistryUnavailable("gone")
        await self.may_commit.wait()
        sha256 = hashlib.sha256(content).hexdigest()
        return registry_pb2.AdapterVersion(name=header.name, version=1, sha256=sha256, config_json="{}")

    async def fetch(self, sha256: str) -> bytes:
        self.num_fetches += 1
        return b"from the registry"


class Host:
    """One engine with an inbox, and a publisher that knows it."""

    def __init__(self, folder: Path) -> None:
        self.inbox = AdapterInbox(folder / "private" / "adapters.sock")
        self.inbox.serve(self._take)
        self.taken: list[HandedAdapter] = []
        self.is_damaging = False
        self.has_taken = asyncio.Event()
        self.registry = Registry()
        self._running = asyncio.get_running_loop()

    def _take(self, adapter: HandedAdapter) -> str:
        self.taken.append(adapter)
        self._running.call_soon_threadsafe(self.has_taken.set)
        content = b"damaged" if self.is_damaging else adapter.content
        return hashlib.sha256(content).hexdigest()


@pytest.fixture
async def host(tmp_path):
    host = Host(tmp_path)
    async with running_engine() as engine:
        host.engine = engine
        engine.adapter_socket_path = str(host.inbox.socket_path)
        engines = EngineDirectory([engine.address], info_timeout_s=10, live_timeout_s=10)
        host.publisher = GrpcPublisher(host.registry, engines, asyncio.get_running_loop())
        yield host
        await engines.close()
    await asyncio.to_thread(host.inbox.close)


HEADER = registry_pb2.PublishHeader(name="helper")


async def test_engines_have_the_bytes_before_the_commit_and_serve_after_it(host):
    content = sealed()
    host.registry.may_commit.clear()
    publishing = asyncio.create_task(asyncio.to_thread(host.publisher.publish, HEADER, content))
    async with asyncio.timeout(60):
        await host.has_taken.wait()
    assert host.taken[0].content == content.view()
    assert (host.taken[0].name, host.taken[0].config_json) == ("helper", content.config_json)
    assert host.engine.prepared == []
    host.registry.may_commit.set()
    version = await publishing
    report = await asyncio.to_thread(host.publisher.make_live, version)
    assert (report.not_live, host.engine.prepared) == ((), ["helper@1"])


async def test_the_next_job_starts_from_what_is_still_in_memory(host, tmp_path):
    content = sealed()
    wanted = bytes(content.view())
    version = await asyncio.to_thread(host.publisher.publish, HEADER, content)
    await asyncio.to_thread(host.publisher.make_live, version)
    content.close()
    point = await asyncio.to_thread(host.publisher.download, version, tmp_path / "start")
    assert point.safetensors_path.read_bytes() == wanted
    assert host.registry.num_fetches == 0
    other = registry_pb2.AdapterVersion(name="other", version=1, sha256="ab" * 32)
    point = await asyncio.to_thread(host.publisher.download, other, tmp_path / "other")
    assert point.safetensors_path.read_bytes() == b"from the registry"


async def test_bytes_that_differ_from_the_published_ones_are_reported_and_not_used(host, tmp_path):
    host.is_damaging = True
    with capture_logs() as logs:
        version = await asyncio.to_thread(host.publisher.publish, HEADER, sealed())
        report = await asyncio.to_thread(host.publisher.make_live, version)
    (line,) = [line for line in logs if line["event"] == "handed_adapter_differs"]
    assert line["published"] == version.sha256 != line["sha256"]
    assert report.not_live == ()  # the engine gets them from the registry
    await asyncio.to_thread(host.publisher.download, version, tmp_path / "start")
    assert host.registry.num_fetches == 1


async def test_a_student_does_not_wait_for_engines_that_do_not_sample(host, tmp_path):
    engines = EngineDirectory(
        [host.engine.address, f"unix:{tmp_path}/away.sock"], info_timeout_s=10, live_timeout_s=2
    )
    host.publisher = GrpcPublisher(host.registry, engines, asyncio.get_running_loop())
    version = await asyncio.to_thread(host.publisher.publish, HEADER, sealed(), "sampler")
    report = await asyncio.to_thread(host.publisher.make_live, version)
    assert (report.not_live, host.engine.prepared) == ((), ["helper@1"])
    version = await asyncio.to_thread(host.publisher.publish, HEADER, sealed())
    report = await asyncio.to_thread(host.publisher.make_live, version)
    assert report.not_live == (f"unix:{tmp_path}/away.sock",)
    await engines.close()


async def test_an_engine_that_takes_nothing_is_left_to_the_registry(host):
    for socket_path in ("", "/nowhere/adapters.sock"):
        host.engine.adapter_socket_path = socket_path
        version = await asyncio.to_thread(host.publisher.publish, HEADER, sealed())
        assert (await asyncio.to_thread(host.publisher.make_live, version)).not_live == ()
    assert host.taken == []


async def test_a_registry_that_is_away_leaves_engines_with_what_they_serve(host):
    host.registry.is_away = True
    content = sealed()
    for _ in range(3):  # as a job that waits for it asks
        with pytest.raises(RegistryUnavailable):
            await asyncio.to_thread(host.publisher.publish, HEADER, content)
    assert host.engine.prepared == []
    host.registry.is_away = False
    version = await asyncio.to_thread(host.publisher.publish, HEADER, content)
    await asyncio.to_thread(host.publisher.make_live, version)
    assert host.engine.prepared == ["helper@1"]
    assert len(host.taken) == 1
