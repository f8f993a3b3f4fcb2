"""The registry over gRPC: publish, fetch, refuse, announce."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
from sqlalchemy.exc import OperationalError

from kiln_common.bus import keys
from kiln_common.bus.connect import connect_async
from kiln_common.clients.registry import BlobCorrupt, RegistryClient
from kiln_common.errors import ErrorKind, KilnError, RegistryUnavailable
from kiln_common.pb import common_pb2, registry_pb2
from kiln_registry.blobs import BlobStore
from kiln_registry.bootstrap import start_registry
from kiln_registry.publisher import Publisher
from kiln_registry.settings import RegistrySettings
from tests.support.redis_server import private_redis
from tests.support.registry import (
    adapter_bytes,
    base_model,
    peft_config,
    publish_header,
    running_registry,
    stored_files,
)


async def test_what_is_published_can_be_fetched(tmp_path):
    content = adapter_bytes()
    async with running_registry(tmp_path) as client:
        version = await client.publish(
            publish_header("helper", job_id="job_1", metrics_json='{"loss": 1.5}', attach=True), content
        )
        assert (version.name, version.version, version.rank, version.alpha) == ("helper", 1, 2, 4.0)
        assert version.sha256 == hashlib.sha256(content).hexdigest()
        assert [*version.targets] == ["down_proj", "gate_proj", "in_proj_qkv"]
        assert await client.fetch(version.sha256) == content
        assert await client.resolve("helper@1") == version == await client.get_default()
        assert (await client.get("helper")).attached_version == 1
        assert [adapter.name for adapter in await client.list()] == ["helper"]
        assert await client.set_default("") is None
        assert await client.get_default() is None
    assert [path.name for path in stored_files(tmp_path)] == [version.sha256]


async def test_others_are_answered_while_the_disk_takes_bytes_that_were_refused(tmp_path, monkeypatch):
    is_syncing, may_end, in_time = threading.Event(), threading.Event(), []

    def slow(descriptor):
        is_syncing.set()
        in_time.append(may_end.wait(60))

    async with running_registry(tmp_path) as client:
        monkeypatch.setattr(os, "fsync", slow)
        publishing = asyncio.create_task(
            client.publish(publish_header("a", sha256="0" * 64), adapter_bytes())
        )
        try:
            await asyncio.to_thread(is_syncing.wait)
            for _ in range(10):  # refused by now, and waiting for the disk
                await client.get_default()
                await asyncio.sleep(0.02)
        finally:
            may_end.set()
        with pytest.raises(KilnError) as refused:
            await publishing
        assert refused.value.code == "sha256_mismatch"
    assert in_time == [True]  # nobody held up the loop that says so


async def test_a_rollback_is_seen_by_the_next_to_resolve_the_name(tmp_path):
    async with running_registry(tmp_path) as client:
        for seed in range(2):
            await client.publish(publish_header("helper", attach=True), adapter_bytes(seed=seed))
        with pytest.raises(KilnError) as caught:
            await client.roll_back("helper", 1, may_move_default=False)
        assert (caught.value.code, caught.value.kind.http_status) == ("default_needs_admin", 403)
        answer = await client.roll_back("helper", 1, may_move_default=True)
        assert answer.has_moved_default
        assert await client.resolve("helper") == answer.version
        assert (answer.version.version, answer.version.rolled_back_over) == (1, 2)
        assert (await client.get_default()).version == 1
        assert (await client.get("helper")).latest_version == 1


async def test_whoever_has_the_bytes_hears_of_their_version_when_it_is_committed(tmp_path):
    content, other = adapter_bytes(), adapter_bytes(seed=1)
    sha256 = hashlib.sha256(content).hexdigest()
    async with running_registry(tmp_path) as client:
        waiting = asyncio.create_task(client.await_publish("helper", sha256, timeout_s=30))
        with pytest.raises(RegistryUnavailable):
            await client.await_publish("helper", sha256, timeout_s=0.05)
        await client.publish(publish_header("helper"), other)
        await client.publish(publish_header("another"), content)
        assert not waiting.done()
        version = await client.publish(publish_header("helper"), content)
        assert await waiting == version
        # Where the commit was first, there is nothing to wait for.
        assert await client.await_publish("helper", sha256, timeout_s=30) == version


async def test_a_version_whose_publisher_went_away_while_it_was_committed_is_told_of(tmp_path, monkeypatch):
    is_committing, may_commit = threading.Event(), threading.Event()
    publish = Publisher.publish

    def slow(*args):
        is_committing.set()
        may_commit.wait(60)
        return publish(*args)

    async def requests():
        yield registry_pb2.PublishRequest(header=publish_header("helper"))
        yield registry_pb2.PublishRequest(chunk=content)

    monkeypatch.setattr(Publisher, "publish", slow)
    content = adapter_bytes()
    registry = await start_registry(RegistrySettings(listen="127.0.0.1:0", state_dir=tmp_path))
    client = RegistryClient(f"127.0.0.1:{registry.port}")
    await client.register_base_model(base_model())
    waiting = asyncio.create_task(
        client.await_publish("helper", hashlib.sha256(content).hexdigest(), timeout_s=60)
    )
    publishing = asyncio.create_task(registry.adapters.Publish(requests(), None))
    await asyncio.to_thread(is_committing.wait)
    publishing.cancel()
    await asyncio.wait({publishing})
    assert publishing.cancelled()
    assert not waiting.done()
    may_commit.set()
    version = await waiting
    assert await client.resolve("helper") == version
    assert [path.name for path in stored_files(tmp_path)] == [version.sha256]
    await client.close()
    await registry.stop()


async def test_a_stop_does_not_wait_for_those_who_wait_for_a_publish(tmp_path):
    fields = {"listen": "127.0.0.1:0", "state_dir": tmp_path, "stop_grace_s": 300}
    registry = await start_registry(RegistrySettings(**fields))
    client = RegistryClient(f"127.0.0.1:{registry.port}")
    waiting = asyncio.create_task(client.await_publish("helper", "0" * 64, timeout_s=300))
    await client.get_default()
    await registry.stop()
    with pytest.raises(KilnError, match="the registry is stopping") as ended:
        await waiting
    assert ended.value.code == RegistryUnavailable.code
    await client.close()


async def test_collecting_spares_what_is_held_and_takes_the_bytes_with_the_version(tmp_path):
    limits = {"keep_versions": 1, "max_versions_per_adapter": 3, "collect_grace_s": 0.0}
    async with running_registry(tmp_path, **limits) as client:
        first = await client.publish(publish_header("helper"), adapter_bytes(seed=0))
        await client.hold("engine", ["helper@1", "nobody"], for_s=60)
        for seed in (1, 2):
            newest = await client.publish(publish_header("helper"), adapter_bytes(seed=seed))
        assert {path.name for path in stored_files(tmp_path)} == {first.sha256, newest.sha256}
        assert [entry.action for entry in await client.list_audit()][:2] == ["collect", "publish"]
        await client.check_publish("helper", "")
        await client.hold("engine", ["helper@1", "helper@3"], for_s=60)
        await client.publish(publish_header("helper"), adapter_bytes(seed=3))
        await client.hold("engine", [f"helper@{number}" for number in (1, 3, 4)], for_s=60)
        for refused in (
            client.check_publish("helper", ""),
            client.publish(publish_header("helper"), adapter_bytes(seed=4)),
        ):
            with pytest.raises(KilnError, match="would have 4 versions, the limit is 3") as caught:
                await refused
            assert (caught.value.code, caught.value.kind.http_status) == ("adapter_quota_exceeded", 409)
        await client.hold("engine", [], for_s=60)
        await client.publish(publish_header("helper"), adapter_bytes(seed=4))
        assert len(stored_files(tmp_path)) == 1


async def test_publishing_again_mends_bytes_that_the_disk_damaged(tmp_path):
    async with running_registry(tmp_path) as client:
        version = await client.publish(publish_header("helper"), adapter_bytes())
        (blob,) = stored_files(tmp_path)
        blob.write_bytes(b"damaged")
        with pytest.raises(BlobCorrupt):
            await client.fetch(version.sha256)
        await client.publish(publish_header("helper"), adapter_bytes())
        assert await client.fetch(version.sha256) == adapter_bytes()


async def test_a_rank_above_the_engines_is_refused_when_it_is_uploaded(tmp_path):
    async with running_registry(tmp_path) as client:
        await client.register_base_model(base_model(), max_adapter_rank=4)
        header = publish_header("wide", config_json=peft_config(rank=5))
        with pytest.raises(KilnError, match="rank 5, the engine holds up to 4") as caught:
            await client.publish(header, adapter_bytes(rank=5))
        assert caught.value.code == "adapter_rank_too_high"
    assert stored_files(tmp_path) == []


async def test_a_file_of_several_chunks_arrives_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(adapter_bytes(rank=200))
    async with running_registry(tmp_path / "state", max_adapter_bytes=path.stat().st_size) as client:
        config = peft_config(rank=200)
        version = await client.publish(publish_header("wide", config_json=config), path)
        assert version.num_bytes == path.stat().st_size
        with pytest.raises(KilnError) as caught:
            await client.publish(publish_header("wide", config_json=config), path.read_bytes() + b"x")
        assert caught.value.code == "adapter_too_large"
        assert caught.value.kind.http_status == 413


@pytest.mark.parametrize(
    ("header", "content", "code"),
    [
        ({"name": "base"}, adapter_bytes(), "reserved_adapter_name"),
        ({"name": "demo"}, adapter_bytes(), "reserved_adapter_name"),
        ({"name": "a/b"}, adapter_bytes(), "invalid_adapter_name"),
        ({"base_model_hash": "nope"}, adapter_bytes(), "unknown_base_model"),
        ({"config_json": "{"}, adapter_bytes(), "invalid_adapter_config"),
        ({"config_json": peft_config(use_dora=True)}, adapter_bytes(), "unsupported_adapter_feature"),
        ({"sha256": "0" * 64}, adapter_bytes(), "sha256_mismatch"),
        ({"metrics_json": "[1]"}, adapter_bytes(), "invalid_publish"),
        ({}, b"\x80\x04" + bytes(100), "pickle_refused"),
        ({}, adapter_bytes()[:-4], "invalid_safetensors"),
        ({}, adapter_bytes(rank=3), "adapter_rank_mismatch"),
    ],
)
async def test_a_refused_publish_leaves_nothing_behind(tmp_path, header, content, code):
    async with running_registry(tmp_path) as client:
        with pytest.raises(KilnError) as caught:
            await client.publish(publish_header(**{"name": "helper", **header}), content)
        assert caught.value.code == code
        assert caught.value.hint
        assert await client.list() == []
    assert stored_files(tmp_path) == []


async def test_a_publish_that_loses_its_race_leaves_no_bytes(tmp_path):
    async with running_registry(tmp_path) as client:
        newer = publish_header("helper", job_id="j", claim_epoch=2, publish_key="k2")
        kept = await client.publish(newer, adapter_bytes(seed=1))
        older = publish_header("helper", job_id="j", claim_epoch=1, publish_key="k1")
        with pytest.raises(KilnError) as caught:
            await client.publish(older, adapter_bytes(seed=2))
        assert caught.value.code == "stale_claim"
    assert [path.name for path in stored_files(tmp_path)] == [kept.sha256]


async def test_publishing_again_under_the_same_key_answers_with_the_first_version(tmp_path):
    async with running_registry(tmp_path) as client:
        header = publish_header("helper", job_id="j", publish_key="j", claim_epoch=1)
        first = await client.publish(header, adapter_bytes(seed=1))
        header.claim_epoch = 2
        assert await client.publish(header, adapter_bytes(seed=2)) == first
        assert len((await client.get("helper")).versions) == 1
    assert len(stored_files(tmp_path)) == 1


async def test_deleting_removes_bytes_nobody_else_needs(tmp_path):
    async with running_registry(tmp_path) as client:
        await client.publish(publish_header("one"), adapter_bytes())
        await client.publish(publish_header("two", attach=True), adapter_bytes())
        assert await client.delete("one", 1) == 1
        assert len(stored_files(tmp_path)) == 1
        with pytest.raises(KilnError) as caught:
            await client.delete("two")
        assert (caught.value.code, caught.value.kind.http_status) == ("adapter_in_use", 409)
        await client.set_default("")
        assert await client.delete("two") == 1
        assert stored_files(tmp_path) == []
        for call in (
            client.fetch("0" * 64),
            client.fetch("../x"),
            client.resolve("two"),
            client.delete("two"),
        ):
            with pytest.raises(KilnError) as caught:
                await call
            assert caught.value.kind.http_status == 404


async def test_start_up_removes_what_a_crash_left(tmp_path):
    async with running_registry(tmp_path) as client:
        kept = await client.publish(publish_header("helper"), adapter_bytes())
    (tmp_path / "uploads" / "half").write_bytes(b"x")
    orphan = tmp_path / "blobs" / "00" / ("0" * 64)
    orphan.parent.mkdir()
    orphan.write_bytes(b"x")
    async with running_registry(tmp_path) as client:
        assert [path.name for path in stored_files(tmp_path)] == [kept.sha256]
        assert (await client.resolve("helper")).sha256 == kept.sha256


def test_a_sweep_spares_the_bytes_of_a_publish_in_progress(tmp_path):
    store = BlobStore(tmp_path, max_blob_bytes=100)
    upload = store.begin_upload()
    upload.write(b"bytes")
    upload.finish("")
    with store.hold(upload) as blob:
        assert store.sweep(set) == 0
        assert store.open_path(blob.sha256).read_bytes() == b"bytes"
    upload.close()
    assert store.sweep(set) == 1
    assert stored_files(tmp_path) == []


async def test_damaged_bytes_are_noticed_by_the_reader(tmp_path):
    async with running_registry(tmp_path) as client:
        version = await client.publish(publish_header("helper"), adapter_bytes())
        (path,) = stored_files(tmp_path)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(KilnError) as caught:
            await client.fetch(version.sha256)
        assert caught.value.code == "blob_corrupt"


async def test_a_base_model_without_modules_is_refused(tmp_path):
    async with running_registry(tmp_path) as client:
        await client.register_base_model(base_model())  # again: fine
        with pytest.raises(KilnError) as caught:
            await client.register_base_model(common_pb2.BaseModel(model_id="x", model_hash="y"))
        assert caught.value.code == "invalid_base_model"


async def test_an_absent_registry_is_unavailable():
    client = RegistryClient("127.0.0.1:1", timeout_s=2.0)
    with pytest.raises(RegistryUnavailable) as caught:
        await client.get_default()
    assert caught.value.kind.http_status == 503
    await client.close()


async def _read_events(redis, count: int) -> list[tuple[str, dict]]:
    """The first `count` different events; a repeated one has the same id."""
    found: dict[bytes, tuple[str, dict]] = {}
    last = "0"
    while len(found) < count:
        for _, entries in await redis.xread({keys.ADAPTER_EVENTS: last}, block=3000) or []:
            for last, fields in entries:  # noqa: B007 the next read goes on after the last one
                found.setdefault(fields[b"id"], (fields[b"type"].decode(), json.loads(fields[b"data"])))
    return [*found.values()]


async def test_changes_are_announced_in_order_and_wait_for_redis(tmp_path):
    with private_redis(tmp_path) as server:
        redis = connect_async(server.url)
        async with running_registry(tmp_path / "state", redis_url=server.url) as client:
            await client.publish(publish_header("helper", attach=True), adapter_bytes())
            first_events = await asyncio.wait_for(_read_events(redis, 2), 60)
            assert [type_ for type_, _ in first_events] == [
                "AdapterPublished",
                "DefaultChanged",
            ]
            await redis.aclose()
            server.kill()
            await client.publish(publish_header("helper"), adapter_bytes())  # Redis is not needed
            await client.set_default("")
            await client.delete("helper", 1)
            server.start()
            redis = connect_async(server.url)
            events = await asyncio.wait_for(_read_events(redis, 5), 60)
            assert [type_ for type_, _ in events[2:]] == [
                "AdapterPublished",
                "DefaultChanged",
                "AdapterDeleted",
            ]
            assert events[2][1]["version"] == 2
            assert events[3][1] == {}
            await redis.aclose()


def test_the_registry_never_imports_torch():
    code = "import sys, kiln_registry.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=60).returncode == 0


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        OperationalError("INSERT", {}, Exception("database or disk is full")),
    ],
)
async def test_a_full_disk_refuses_a_version_by_name_and_keeps_nothing_of_it(tmp_path, monkeypatch, failure):
    def full(*arguments):
        raise failure

    async with running_registry(tmp_path) as client:
        with monkeypatch.context() as patch:
            patch.setattr("kiln_registry.catalog.Catalog.publish", full)
            with pytest.raises(KilnError) as refused:
                await client.publish(publish_header("helper"), adapter_bytes())
        assert refused.value.code == "registry_storage_full"
        assert refused.value.kind is ErrorKind.UNAVAILABLE
        assert stored_files(tmp_path) == []
        assert (await client.publish(publish_header("helper"), adapter_bytes())).version == 1
