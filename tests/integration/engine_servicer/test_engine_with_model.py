"""The engine on a real tiny model with a real registry and Redis: adapters, weights, start and stop."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from kiln_common.clients.engine import EngineClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.errors import KilnError
from kiln_common.model_folder import ModelFolderMissing
from kiln_common.pb import common_pb2, registry_pb2
from kiln_common.settings import ConfigurationError
from kiln_engine.bootstrap import start_engine
from kiln_engine.device_side import ModelNotLoaded, load_device_side
from kiln_engine.settings import EngineSettings
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec
from kiln_nn.lora.peft_format import serialize_adapter
from kiln_nn.sharing import attach
from kiln_nn.sharing.sealed_adapter import SealedAdapter
from kiln_registry.bootstrap import start_registry
from kiln_registry.settings import RegistrySettings
from tests.support.engine_server import collect, generate_request
from tests.support.redis_server import private_redis
from tests.support.tiny_models import make_checkpoint, random_adapter
from tests.support.variants import quantization

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-model"
    make_checkpoint(folder)
    return folder


def settings_for(checkpoint, folder, **fields) -> EngineSettings:
    base = {
        "model_path": str(checkpoint),
        "listen": f"unix:{folder}/engine.sock",
        "device": "cpu",
        "socket_dir": folder / "run",
        "max_model_len": 256,
        "kv_cache_tokens": 1024,
        "max_running": 4,
        "step_token_budget": 64,
        "num_adapter_slots": 2,
        "max_adapter_rank": 8,
        "drain_timeout_s": 0.5,
    }
    return EngineSettings(**{**base, **fields})


@contextlib.asynccontextmanager
async def real_engine(settings: EngineSettings):
    engine = await start_engine(settings, load_device_side(settings))
    client = EngineClient(settings.listen)
    try:
        yield engine, client
    finally:
        await client.close()
        await engine.stop()


@contextlib.asynccontextmanager
async def real_registry(folder, redis_url=""):
    settings = RegistrySettings(
        listen="127.0.0.1:0", state_dir=folder / "registry", redis_url=redis_url, stop_grace_s=0.1
    )
    registry = await start_registry(settings)
    client = RegistryClient(f"127.0.0.1:{registry.port}", timeout_s=60.0)
    try:
        yield f"127.0.0.1:{registry.port}", client
    finally:
        await client.close()
        await registry.stop()


ALL_LAYERS = LoraSpec(rank=4, alpha=8, targets="all")
WITH_MTP = LoraSpec(rank=4, alpha=8, targets="all", with_mtp=True)


async def publish(
    registry: RegistryClient, checkpoint, model_hash: str, seed: int, spec: LoraSpec = ALL_LAYERS
) -> common_pb2.AdapterRef:
    """Publish a random adapter as the next version of "style"."""
    config_json, content = serialize_adapter(
        random_adapter(ModelConfig.from_folder(checkpoint), spec, seed), spec, "tiny-model"
    )
    header = registry_pb2.PublishHeader(name="style", base_model_hash=model_hash, config_json=config_json)
    version = await registry.publish(header, content)
    return common_pb2.AdapterRef(name="style", version=version.version, sha256=version.sha256)


async def until_registered(registry: RegistryClient, checkpoint, model_hash: str, seed: int, **options):
    """Publish as soon as the engine has announced its model."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await publish(registry, checkpoint, model_hash, seed, **options)
            except KilnError as error:
                if "base_model" not in error.code:
                    raise
                await asyncio.sleep(0.02)


def tokens(outputs) -> list[int]:
    assert outputs[-1].error.code == "", outputs[-1].error
    return [token for output in outputs for token in output.token_ids]


async def test_adapters_are_fetched_on_demand_and_change_the_answer(checkpoint, tmp_path):
    async with real_registry(tmp_path) as (address, registry):
        settings = settings_for(checkpoint, tmp_path, registry_address=address)
        async with real_engine(settings) as (_, client):
            model_hash = (await client.get_info()).base_model.model_hash
            first = await until_registered(registry, checkpoint, model_hash, seed=1)
            second = await publish(registry, checkpoint, model_hash, seed=2)
            requests = {
                "base": generate_request("base", **GREEDY),
                "one": generate_request("one", adapters=[first], **GREEDY),
                "two": generate_request("two", adapters=[second], **GREEDY),
            }
            together = await asyncio.gather(*(collect(client, request) for request in requests.values()))
            answers = {name: tokens(outputs) for name, outputs in zip(requests, together, strict=True)}
            assert len({tuple(answer) for answer in answers.values()}) == 3
            # Alone, and from the prefix cache, each adapter says the same again.
            for name, request in requests.items():
                request.request_id += "-again"
                outputs = await collect(client, request)
                assert outputs[0].num_cached_tokens == 16
                assert tokens(outputs) == answers[name]
            stats = await client.get_stats()
            assert {entry.adapter.version for entry in stats.resident_adapters} == {1, 2}
            assert {entry.num_pins for entry in stats.resident_adapters} == {0}
            assert sum(stats.adapter_load_seconds.counts) == 2


async def test_an_answer_begun_elsewhere_goes_on_with_its_adapter(checkpoint, tmp_path):
    drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 24}
    async with real_registry(tmp_path) as (address, registry):
        settings = settings_for(checkpoint, tmp_path, registry_address=address)
        async with real_engine(settings) as (_, client):
            model_hash = (await client.get_info()).base_model.model_hash
            style = await until_registered(registry, checkpoint, model_hash, seed=1)
            whole = tokens(await collect(client, generate_request("whole", adapters=[style], **drawn)))
            assert whole != tokens(await collect(client, generate_request("base", **drawn)))
            for count in (1, 9, 23):
                rest = generate_request(
                    f"{count}", adapters=[style], resumed_token_ids=whole[:count], **drawn
                )  # fmt: skip
                assert tokens(await collect(client, rest)) == whole[count:]


async def test_more_versions_than_slots_take_turns(checkpoint, tmp_path):
    async with real_registry(tmp_path) as (address, registry):
        settings = settings_for(checkpoint, tmp_path, registry_address=address, num_adapter_slots=1)
        async with real_engine(settings) as (_, client):
            model_hash = (await client.get_info()).base_model.model_hash
            refs = [await until_registered(registry, checkpoint, model_hash, seed=1)]
            refs += [await publish(registry, checkpoint, model_hash, seed=seed) for seed in (2, 3)]
            requests = [
                generate_request(f"r{number}", adapters=[refs[number % 3]], **GREEDY) for number in range(6)
            ]
            answers = [
                tokens(outputs) for outputs in await asyncio.gather(*(collect(client, r) for r in requests))
            ]
            assert answers[:3] == answers[3:]
            assert len({tuple(answer) for answer in answers}) == 3


async def test_a_published_version_is_fetched_before_anyone_asks(checkpoint, tmp_path):
    with private_redis(tmp_path) as redis:
        async with real_registry(tmp_path, redis.url) as (address, registry):
            settings = settings_for(checkpoint, tmp_path, registry_address=address, redis_url=redis.url)
            async with real_engine(settings) as (engine, client):
                model_hash = (await client.get_info()).base_model.model_hash
                async with asyncio.timeout(60):
                    while not engine.adapters.resident:
                        await until_registered(registry, checkpoint, model_hash, seed=1)
                        await asyncio.sleep(0.2)
                adapter = engine.adapters.resident[0].adapter
                ref = common_pb2.AdapterRef(name=adapter.name, version=adapter.version, sha256=adapter.sha256)
                assert not (await client.prepare_adapter(ref)).was_loaded


async def test_the_attached_default_is_fetched_without_any_event(checkpoint, tmp_path):
    async with real_registry(tmp_path) as (address, registry):
        settings = settings_for(checkpoint, tmp_path, registry_address=address, adapter_refresh_s=0.05)
        async with real_engine(settings) as (engine, client):
            model_hash = (await client.get_info()).base_model.model_hash
            ref = await until_registered(registry, checkpoint, model_hash, seed=1)
            await registry.set_default(f"style@{ref.version}")
            async with asyncio.timeout(60):
                while not engine.adapters.resident:
                    await asyncio.sleep(0.02)
            assert not (await client.prepare_adapter(ref)).was_loaded


@pytest.mark.parametrize("is_handed_over", [False, True])
async def test_matrices_for_the_mtp_layer_come_with_an_adapter(checkpoint, tmp_path, is_handed_over):
    """As bytes from the registry, or as memory ahead of them; the answer is that of an engine without drafts."""
    config = ModelConfig.from_folder(checkpoint)
    tensors = random_adapter(config, WITH_MTP, seed=1)
    async with real_registry(tmp_path) as (address, registry):
        answers = []
        for kind in ("none", "mtp"):
            (folder := tmp_path / kind).mkdir()
            settings = settings_for(
                checkpoint, folder, registry_address=address, speculation=kind, adaptive_drafts=False
            )
            async with real_engine(settings) as (engine, client):
                info = await client.get_info()
                model_hash = info.base_model.model_hash
                if is_handed_over:
                    sealed = SealedAdapter(tensors, WITH_MTP, "tiny-model")
                    path = info.adapter_socket_path
                    sha256 = await asyncio.to_thread(sealed.hand_over, path, "style", 5.0)
                    sealed.close()
                    assert [entry.sha256 for entry in engine.adapters._slots.entries] == [sha256]
                ref = await until_registered(registry, checkpoint, model_hash, seed=1, spec=WITH_MTP)
                assert not is_handed_over or sha256 == ref.sha256
                request = generate_request("r", adapters=[ref], seed=5, max_tokens=30)
                answers.append(tokens(await collect(client, request)))
                tables = engine.adapters._store._tables
                if kind == "none":
                    assert tables.get("mtp.fc") is None
                else:
                    (entry,) = engine.adapters.resident
                    a_rI, b_Or = tensors["mtp.fc"]
                    linear = tables.get("mtp.fc")
                    assert linear.a_SQI[entry.slot - 1, :4].equal(a_rI)
                    assert linear.b_SRO[entry.slot - 1, :4].t().equal(b_Or)
                    (drafts,) = (await client.get_stats()).drafts
                    assert drafts.adapter == "style"
                    assert drafts.num_proposed > 20
        assert answers[0] == answers[1]


async def test_an_unknown_adapter_names_its_code(checkpoint, tmp_path):
    async with real_registry(tmp_path) as (address, _):
        settings = settings_for(checkpoint, tmp_path, registry_address=address)
        async with real_engine(settings) as (_, client):
            ref = common_pb2.AdapterRef(name="nobody", version=3, sha256="ab" * 32)
            [failure] = await collect(client, generate_request(adapters=[ref]))
            assert failure.error.code == "adapter_not_found"


async def test_the_weights_can_be_mapped_and_do_not_change(checkpoint, tmp_path):
    async with real_engine(settings_for(checkpoint, tmp_path)) as (_, client):
        share = await client.share_weights()
        before = await client.checksum()
        with await asyncio.to_thread(attach, share.socket_path, share.boot_id) as shared:
            assert shared.manifest.model_hash == share.model_hash
            assert shared.checksum() == before.sha256
            assert (await client.get_stats()).num_weight_leases == 1
            await collect(client, generate_request())
        assert await client.checksum() == before


async def test_batching_does_not_change_a_seeded_answer(checkpoint, tmp_path):
    async with real_engine(settings_for(checkpoint, tmp_path)) as (_, client):
        alone = tokens(await collect(client, generate_request("alone", seed=5, max_tokens=30)))
        crowd = [generate_request(f"r{i}", [i + 1] * (5 * i + 3), seed=i, max_tokens=30) for i in range(6)]
        crowd.append(generate_request("among", seed=5, max_tokens=30))
        answers = await asyncio.gather(*(collect(client, request) for request in crowd))
        assert tokens(answers[-1]) == alone


@pytest.mark.parametrize(("kind", "scheme"), [("mtp", "none"), ("ngram", "fp8")])
async def test_drafts_are_counted_and_do_not_change_an_answer(checkpoint, tmp_path, kind, scheme):
    prompt = list(range(30, 40)) * 3  # whose repetitions the text can be guessed by
    asked = [{"seed": 5}, {"temperature": 0.0}]
    answers = []
    for name in ("none", kind):
        (folder := tmp_path / name).mkdir()
        drafts = {"speculation": name, "adaptive_drafts": False}
        async with real_engine(settings_for(checkpoint, folder, quantization=scheme, **drafts)) as (
            _,
            client,
        ):
            requests = [
                generate_request(f"r{i}", prompt, max_tokens=30, **fields) for i, fields in enumerate(asked)
            ]
            outputs = await asyncio.gather(*(collect(client, request) for request in requests))
            answers.append([tokens(each) for each in outputs])
            counted = (await client.get_stats()).drafts
    assert answers[0] == answers[1]
    [base] = counted
    assert base.adapter == ""
    assert 0 < base.num_proposed >= base.num_accepted
    assert base.num_accepted or kind == "mtp"  # whose layer has learned nothing here


async def test_preemption_does_not_change_an_answer(checkpoint, tmp_path):
    requests = [generate_request(f"r{i}", [i + 1] * 20, temperature=0.0, max_tokens=60) for i in range(4)]
    answers = []
    for name, kv_cache_tokens in (("roomy", 1024), ("crowded", 160)):
        folder = tmp_path / name
        folder.mkdir()
        settings = settings_for(checkpoint, folder, kv_cache_tokens=kv_cache_tokens, max_model_len=128)
        async with real_engine(settings) as (_, client):
            outputs = await asyncio.gather(*(collect(client, request) for request in requests))
            answers.append([tokens(output) for output in outputs])
            num_preemptions = (await client.get_stats()).num_preemptions
            assert (num_preemptions > 0) == (name == "crowded")
    assert answers[0] == answers[1]


def test_a_folder_without_a_model_stops_the_start(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelNotLoaded) as caught:
        load_device_side(settings_for(tmp_path / "nothing", tmp_path))
    assert caught.value.code == "model_not_found"
    assert isinstance(caught.value, ConfigurationError)
    assert caught.value.hint


def test_a_path_that_is_no_model_stops_the_start(tmp_path):
    with pytest.raises(ModelFolderMissing, match="nowhere"):
        load_device_side(settings_for(tmp_path / "nowhere", tmp_path))


@contextlib.asynccontextmanager
async def engine_process(settings: EngineSettings):
    """The engine as a process of its own, ready, with a client; its log is read when it has ended."""
    env = {f"KILN_ENGINE_{name.upper()}": str(value) for name, value in settings.model_dump().items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "kiln_engine"], env={**os.environ, **env}, stderr=subprocess.PIPE
    )
    client = EngineClient(settings.listen)
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    await client.get_info()
                    break
                except KilnError:
                    assert process.poll() is None, process.stderr.read().decode()
                    await asyncio.sleep(0.1)
        yield process, client
    finally:
        process.kill()
        await client.close()


@pytest.mark.skipif(quantization() != "none", reason="weights are expected to be as large as they are stored")
async def test_the_engine_says_what_holds_its_memory(checkpoint, tmp_path):
    async with real_engine(settings_for(checkpoint, tmp_path)) as (_, client):
        stats = await client.get_stats()
        memory = {part.name: part.num_bytes for part in stats.memory_parts}
        assert set(memory) == {"weights", "kv", "states", "adapters", "workspace"}
        weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        # The file has a header besides; the arena pads between tensors.
        assert memory["weights"] == pytest.approx(weights, rel=0.2)
        assert min(memory.values()) > 0
        assert sum(memory.values()) < stats.num_device_bytes
        assert 0 < stats.num_device_bytes_free < stats.num_device_bytes
        assert (await client.get_info()).device_id.startswith("cpu:")


@pytest.mark.processes
@pytest.mark.parametrize(("drain_timeout_s", "code"), [(60.0, ""), (0.0, "answer_handed_back")])
async def test_the_process_stops_under_traffic(checkpoint, tmp_path, drain_timeout_s, code):
    """Answers under way are finished, or handed back when time is up; none is cut off silently."""
    settings = settings_for(checkpoint, tmp_path, drain_timeout_s=drain_timeout_s)
    async with engine_process(settings) as (process, client):
        requests = [generate_request(f"r{i}", [i + 1] * 20, max_tokens=230) for i in range(6)]  # four run
        assert (await client.get_info()).base_model.model_id == "tiny-model"
        begun = [asyncio.create_task(collect(client, request)) for request in requests]
        async with asyncio.timeout(60):
            while (stats := await client.get_stats()).num_running + stats.num_waiting < len(requests):
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        lasts = [outputs[-1] for outputs in await asyncio.gather(*begun)]
        assert {last.error.code for last in lasts} == {code}
        assert await asyncio.to_thread(process.wait, 60) == 0
    log = process.stderr.read().decode()
    assert "memory_plan" in log
    assert "Traceback" not in log
    assert not (tmp_path / "run" / "weights.sock").exists()
