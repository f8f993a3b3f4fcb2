"""gRPC for clients from outside: the same keys and scopes as over HTTP."""

import contextlib
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from kiln_common.api_keys import KeyRing, digest_of
from kiln_common.bus import keys as bus_keys
from kiln_common.bus.connect import connect
from kiln_common.pb import engine_pb2, engine_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from kiln_common.rpc.errors import from_rpc_error
from kiln_engine.settings import EngineSettings
from kiln_trainer.bootstrap import start_trainer
from kiln_trainer.settings import TrainerSettings
from tests.integration.jobs.test_plain_grpc import run_example
from tests.support.engine_server import StubbornRunner, generate_request, make_parts, running_engine
from tests.support.fake_engine import running_engine as adapter_engine
from tests.support.jobs import ChainBackend, grpo_request, opd_request
from tests.support.redis_server import private_redis
from tests.support.registry import adapter_bytes, publish_header, running_registry

KEYS = {
    "infer-key-0123456789": ["infer"],
    "train-key-0123456789": ["train"],
    "other-key-0123456789": ["infer", "train"],
    "admin-key-0123456789": ["infer", "train", "admin"],
}


@pytest.fixture
def keys_file(tmp_path):
    entries = [{"name": k[:5], "sha256": digest_of(k), "scopes": scopes} for k, scopes in KEYS.items()]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    return path


def bearer(name):
    return (("authorization", f"Bearer {name}-key-0123456789"),)


async def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = from_rpc_error(caught.value, "service", AssertionError)
    return error.code


async def test_an_engine_checks_the_keys_of_clients_and_salts_their_prefixes(tmp_path, keys_file):
    parts = make_parts(StubbornRunner())
    settings = {"client_listen": "127.0.0.1:0", "api_keys_file": keys_file}
    async with running_engine(parts, tmp_path, **settings) as (engine, services_client):
        assert (await services_client.get_info()).boot_id == "boot"  # services need no key
        async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.client_server.port}") as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            assert await refusal(stub.GetInfo(engine_pb2.GetInfoRequest())) == "invalid_api_key"
            wrong = (("authorization", "Bearer wrong"),)
            assert (
                await refusal(stub.GetInfo(engine_pb2.GetInfoRequest(), metadata=wrong)) == "invalid_api_key"
            )
            refused = stub.Generate(generate_request(), metadata=bearer("train"))
            assert await refusal(anext(aiter(refused))) == "scope_missing"
            session = stub.Session(iter([]))
            assert await refusal(anext(aiter(session))) == "invalid_api_key"
            drain = stub.Drain(engine_pb2.DrainRequest(deadline_s=1), metadata=bearer("infer"))
            assert await refusal(drain) == "scope_missing"

            async def cached_tokens(name, request_id):
                call = stub.Generate(generate_request(request_id, range(40)), metadata=bearer(name))
                first, *_ = [output async for output in call]
                return first.num_cached_tokens

            assert await cached_tokens("infer", "a") == 0
            assert await cached_tokens("infer", "b") > 0
            assert await cached_tokens("admin", "c") == 0


async def test_a_key_uses_only_its_own_adapters_on_an_engine(tmp_path, keys_file):
    parts = make_parts(StubbornRunner())
    owners = {entry.name: entry.caller().owner for entry in KeyRing(file=keys_file)._keys}
    async with running_registry(tmp_path / "registry") as registry:
        header = publish_header("theirs", owner=owners["other"])
        theirs = await registry.publish(header, adapter_bytes())
        mine = await registry.publish(publish_header("mine", owner=owners["infer"]), adapter_bytes(seed=1))
        settings = {
            "client_listen": "127.0.0.1:0", "api_keys_file": keys_file, "registry_address": registry.address,
        }  # fmt: skip
        async with (
            running_engine(parts, tmp_path, **settings) as (engine, services_client),
            grpc.aio.insecure_channel(f"127.0.0.1:{engine.client_server.port}") as channel,
        ):
            stub = engine_pb2_grpc.EngineStub(channel)

            def generate(key, name, sha256):
                request = generate_request(f"{key}-{name}")
                request.adapters.add(name=name, version=1, sha256=sha256)
                return aiter(stub.Generate(request, metadata=bearer(key)))

            for name, sha256 in (("theirs", theirs.sha256), ("mine", mine.sha256)):
                assert await anext(generate("admin", name, sha256))
            # They are resident now: that gives nobody else their use.
            assert await anext(generate("infer", "mine", mine.sha256))
            for name in ("theirs", "mine"):
                refused = generate("infer", name, theirs.sha256)
                assert await refusal(anext(refused)) == "adapter_not_found"
            request = generate_request("in a session")
            request.adapters.add(name="theirs", version=1, sha256=theirs.sha256)
            session = stub.Session(metadata=bearer("infer"))
            await session.write(engine_pb2.SessionRequest(submit=request))
            (output,) = (await session.read()).outputs
            assert output.error.code == "adapter_not_found"

            ask = engine_pb2.GetStatsRequest()
            assert len((await services_client.get_stats()).resident_adapters) == 2
            assert len((await stub.GetStats(ask, metadata=bearer("admin"))).resident_adapters) == 2
            assert not (await stub.GetStats(ask, metadata=bearer("infer"))).resident_adapters


@contextlib.asynccontextmanager
async def trainer_for_clients(tmp_path, keys_file):
    """Yields (address of the clients' listener, stub there, registry, its Redis)."""
    with private_redis(tmp_path) as redis:
        async with running_registry(tmp_path / "registry") as registry, adapter_engine() as engine:
            settings = TrainerSettings(
                listen="127.0.0.1:0", client_listen="127.0.0.1:0", api_keys_file=keys_file,
                redis_url=redis.url, registry_address=registry.address,
                engine_addresses=(engine.address,), state_dir=tmp_path / "trainer",
            )  # fmt: skip
            trainer = await start_trainer(settings, lambda _: ChainBackend())
            try:
                address = f"127.0.0.1:{trainer.client_server.port}"
                async with grpc.aio.insecure_channel(address) as channel:
                    yield address, trainer_pb2_grpc.TrainerStub(channel), registry, redis
            finally:
                await trainer.stop()


async def ended(stub, name, job):
    events = stub.WatchJob(trainer_pb2.WatchJobRequest(id=job.id), metadata=bearer(name))
    assert [event.type async for event in events][-1] == "succeeded"


async def test_a_trainer_checks_the_keys_of_clients(tmp_path, keys_file):
    async with trainer_for_clients(tmp_path, keys_file) as (_, stub, _, _):
        request = grpo_request("helper")
        request.idempotency_key = "once"
        assert await refusal(stub.Submit(request)) == "invalid_api_key"
        assert await refusal(stub.Submit(request, metadata=bearer("infer"))) == "scope_missing"
        job = await stub.Submit(request, metadata=bearer("train"))
        assert (await stub.Submit(request, metadata=bearer("train"))).id == job.id
        request.config.adapter = "of-admins"
        assert (await stub.Submit(request, metadata=bearer("admin"))).id != job.id
        await ended(stub, "train", job)
        for config in ({"attach": True}, {"priority": -1}):
            refused = stub.Submit(grpo_request("other", **config), metadata=bearer("train"))
            assert await refusal(refused) == "scope_missing"


async def test_a_job_is_its_keys_and_admins(tmp_path, keys_file):
    alice, mallory, admin = bearer("train"), bearer("other"), bearer("admin")
    async with trainer_for_clients(tmp_path, keys_file) as (_, stub, registry, _):
        request = grpo_request("helper")
        request.owner = "somebody"
        request.config.gate.CopyFrom(trainer_pb2.Gate(suite_id="x", timeout_s=1, owner="somebody"))
        assert await refusal(stub.Submit(request, metadata=alice)) == "eval_suite_not_found"
        request.config.ClearField("gate")
        job = await stub.Submit(request, metadata=alice)
        assert job.owner not in ("", "somebody")
        await ended(stub, "train", job)
        assert (await registry.resolve("helper")).owner == job.owner
        for method, message in (
            (stub.GetJob, trainer_pb2.GetJobRequest(id=job.id)),
            (stub.CancelJob, trainer_pb2.CancelJobRequest(id=job.id)),
            (stub.RetryJob, trainer_pb2.RetryJobRequest(id=job.id)),
        ):
            assert await refusal(method(message, metadata=mallory)) == "job_not_found"
        watched = stub.WatchJob(trainer_pb2.WatchJobRequest(id=job.id), metadata=mallory)
        assert await refusal(anext(aiter(watched))) == "job_not_found"
        theirs = trainer_pb2.ListJobsRequest(owner=job.owner)
        assert not (await stub.ListJobs(theirs, metadata=mallory)).jobs
        assert [each.id for each in (await stub.ListJobs(theirs, metadata=alice)).jobs] == [job.id]
        assert (await stub.GetJob(trainer_pb2.GetJobRequest(id=job.id), metadata=admin)).id == job.id
        retry = trainer_pb2.RetryJobRequest(id=job.id, owner="somebody")
        again = await stub.RetryJob(retry, metadata=alice)
        assert (again.owner, again.retry_of) == (job.owner, job.id)


async def test_a_job_uses_nothing_of_another_key(tmp_path, keys_file):
    async with trainer_for_clients(tmp_path, keys_file) as (_, stub, _, redis):
        job = await stub.Submit(grpo_request("helper"), metadata=bearer("train"))
        await ended(stub, "train", job)
        for request, code in (
            (grpo_request("helper"), "adapter_name_taken"),
            (grpo_request("helper", start_fresh=True), "adapter_name_taken"),
            (grpo_request("mine", base_adapter="helper@1"), "adapter_not_found"),
            (opd_request("mine", teacher="helper@1"), "adapter_not_found"),
        ):
            assert await refusal(stub.Submit(request, metadata=bearer("other"))) == code
        client = connect(redis.url)
        client.hset(bus_keys.correction("corr_1"), mapping={"owner": job.owner, "correction": "x"})
        client.close()
        request = grpo_request("mine")
        request.correction_ids.append("corr_1")
        assert await refusal(stub.Submit(request, metadata=bearer("other"))) == "corrections_taken"
        assert await stub.Submit(grpo_request("by-admin", base_adapter="helper"), metadata=bearer("admin"))


async def test_the_example_trains_with_a_key(tmp_path, keys_file):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"token_ids": [1, 2, 3], "num_prompt_tokens": 1}) + "\n")
    async with trainer_for_clients(tmp_path, keys_file) as (address, _, _, _):
        key = bearer("train")[0][1].removeprefix("Bearer ")
        lines = await run_example(None, address, data, "helper", "--key", key)
    assert lines[-1].split()[1:3] == ["succeeded", "helper@1"]


def test_clients_from_afar_need_keys(tmp_path):
    with pytest.raises(ValidationError, match="api_keys_file is not set"):
        EngineSettings(model_path="unused", client_listen="0.0.0.0:8440")
    with pytest.raises(ValidationError, match="api_keys_file is not set"):
        EngineSettings(model_path="unused", client_listen="[::]:8440")
    assert EngineSettings(model_path="unused", client_listen="127.0.0.1:8440").api_keys_file is None
