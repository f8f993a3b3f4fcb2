"""gRPC for clients from outside: the same keys and scopes as over HTTP."""

import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from kiln_common.api_keys import digest_of
from kiln_common.pb import engine_pb2, engine_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from kiln_common.rpc.errors import from_rpc_error
from kiln_engine.settings import EngineSettings
from kiln_trainer.bootstrap import start_trainer
from kiln_trainer.settings import TrainerSettings
from tests.support.engine_server import StubbornRunner, generate_request, make_parts, running_engine
from tests.support.fake_engine import running_engine as adapter_engine
from tests.support.jobs import ChainBackend, grpo_request
from tests.support.redis_server import private_redis
from tests.support.registry import running_registry

KEYS = {
    "infer-key-0123456789": ["infer"],
    "train-key-0123456789": ["train"],
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


async def test_a_trainer_checks_the_keys_of_clients(tmp_path, keys_file):
    with private_redis(tmp_path) as redis:
        async with running_registry(tmp_path / "registry") as registry, adapter_engine() as engine:
            settings = TrainerSettings(
                listen="127.0.0.1:0", client_listen="127.0.0.1:0", api_keys_file=keys_file,
                redis_url=redis.url, registry_address=registry.address,
                engine_addresses=(engine.address,), state_dir=tmp_path / "trainer",
            )  # fmt: skip
            trainer = await start_trainer(settings, lambda _: ChainBackend())
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{trainer.client_server.port}") as channel:
                    stub = trainer_pb2_grpc.TrainerStub(channel)
                    request = grpo_request("helper")
                    request.idempotency_key = "once"
                    assert await refusal(stub.Submit(request)) == "invalid_api_key"
                    assert await refusal(stub.Submit(request, metadata=bearer("infer"))) == "scope_missing"
                    job = await stub.Submit(request, metadata=bearer("train"))
                    assert (await stub.Submit(request, metadata=bearer("train"))).id == job.id
                    assert (await stub.Submit(request, metadata=bearer("admin"))).id != job.id
                    events = stub.WatchJob(trainer_pb2.WatchJobRequest(id=job.id), metadata=bearer("train"))
                    assert [event.type async for event in events][-1] == "succeeded"
                    attaching = grpo_request("other", attach=True)
                    assert await refusal(stub.Submit(attaching, metadata=bearer("train"))) == "scope_missing"
            finally:
                await trainer.stop()


def test_clients_from_afar_need_keys(tmp_path):
    with pytest.raises(ValidationError, match="api_keys_file is not set"):
        EngineSettings(model_path="unused", client_listen="0.0.0.0:8440")
    with pytest.raises(ValidationError, match="api_keys_file is not set"):
        EngineSettings(model_path="unused", client_listen="[::]:8440")
    assert EngineSettings(model_path="unused", client_listen="127.0.0.1:8440").api_keys_file is None
