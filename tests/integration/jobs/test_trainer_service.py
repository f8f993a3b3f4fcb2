"""The trainer over gRPC, with a real registry, a real Redis and an engine that takes adapters."""

import asyncio
import contextlib
import threading

import pytest

from kiln_common.bus.connect import connect
from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import KilnError, TrainerUnavailable
from kiln_trainer.bootstrap import start_trainer
from kiln_trainer.domain.capacity import Capacity
from kiln_trainer.settings import TrainerSettings
from tests.support.fake_engine import running_engine
from tests.support.jobs import ChainBackend, grpo_request
from tests.support.redis_server import private_redis
from tests.support.registry import running_registry

pytestmark = pytest.mark.usefixtures("redis_client")  # each test finds the queue empty


@contextlib.asynccontextmanager
async def stack(redis_url, tmp_path, backend=None, **settings):
    """Yields (trainer client, registry client, engine)."""
    async with running_registry(tmp_path / "registry") as registry, running_engine() as engine:
        fields = {
            "listen": "127.0.0.1:0",
            "redis_url": redis_url,
            "registry_address": registry.address,
            "engine_addresses": (engine.address,),
            "state_dir": tmp_path / "trainer",
            "claim_timeout_s": 0.5,
            "live_timeout_s": 10.0,
            **settings,
        }
        trainer = await start_trainer(TrainerSettings(**fields), lambda _: backend or ChainBackend())
        client = TrainerClient(f"127.0.0.1:{trainer.port}")
        client.address = f"127.0.0.1:{trainer.port}"
        try:
            yield client, registry, engine
        finally:
            await client.close()
            await trainer.stop()


async def watch_all(client, job_id, after=""):
    return [event async for event in client.watch(job_id, after)]


async def code_of(call) -> str:
    with pytest.raises(KilnError) as caught:
        await call
    return caught.value.code


async def test_from_submit_to_the_engines(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, registry, engine):
        job = await client.submit(grpo_request("helper", attach=True))
        assert job.status in ("queued", "running")
        events = await asyncio.wait_for(watch_all(client, job.id), 60)
        assert events[0].type == "queued"
        assert events[-1].type == "succeeded"
        done = await client.get(job.id)
        version = await registry.resolve("helper")
        assert (done.result.version, done.result.sha256) == (1, version.sha256)
        assert await registry.get_default() == version
        assert engine.prepared == ["helper@1"]
        assert [*done.result.not_live] == []
        again = await watch_all(client, job.id, events[3].id)
        assert again == events[4:]
        assert await watch_all(client, job.id, events[-1].id) == []
        follow_up = await client.submit(grpo_request("helper", attach=False, metadata_json='{"run": 2}'))
        await asyncio.wait_for(watch_all(client, follow_up.id), 60)
        followed = await client.get(follow_up.id)
        assert (followed.resolved_base_adapter, followed.config.metadata_json) == ("helper@1", '{"run": 2}')
        assert (followed.result.version, await registry.get_default()) == (2, version)
        second = await registry.resolve("helper")
        assert second.parent_version == 1
        assert len(second.data_sha256) == 64
        assert second.data_sha256 == version.data_sha256  # the same data under other settings
        assert [found.id for found in await client.list()] == [follow_up.id, job.id]
        status = await client.status()
        assert (status.num_queued, status.engine_boot_id) == (0, "boot")
        assert (status.gpu_sharing, status.gpu_share, status.gpu_sms) == ("none", 1.0, 0)
        assert status.num_trained_tokens == done.progress.num_tokens + followed.progress.num_tokens
        # The first step of each job is not timed.
        assert sum(status.step_seconds.counts) == done.progress.step + followed.progress.step - 2
        assert (sum(status.swap_seconds.counts), status.metrics["loss"]) == (2, followed.metrics["loss"])
        assert status.num_jobs_ended["succeeded"] >= 1  # the second may not be counted yet
        assert status.num_device_bytes > 2**20  # this process holds more than a MiB


async def test_an_engine_that_does_not_take_the_result_is_named(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path, live_timeout_s=1.0) as (client, _, engine):
        engine.refuses = True
        job = await client.submit(grpo_request())
        await asyncio.wait_for(watch_all(client, job.id), 60)
        done = await client.get(job.id)
        assert (done.status, [*done.result.not_live]) == ("succeeded", ["boot_1"])


async def test_bad_jobs_are_refused_and_nothing_is_queued(redis_server, redis_client, tmp_path):
    async with stack(redis_server.url, tmp_path, max_payload_bytes=2000) as (client, _, _):
        bad_token = grpo_request()
        bad_token.grpo.groups[0].rollouts[0].completion_token_ids[0] = 10_000
        assert await code_of(client.submit(bad_token)) == "invalid_token_ids"
        other_model = grpo_request()
        other_model.base_model_hash = "ff" * 32
        assert await code_of(client.submit(other_model)) == "base_model_mismatch"
        assert await code_of(client.submit(grpo_request("demo"))) == "reserved_adapter_name"
        big = grpo_request(metadata_json='{"a": "' + "x" * 3000 + '"}')
        assert await code_of(client.submit(big)) == "payload_too_large"
        assert await client.list() == []
        assert await code_of(client.get("job_none")) == "job_not_found"
        assert await code_of(client.cancel("job_none")) == "job_not_found"
        assert await code_of(watch_all(client, "job_none")) == "job_not_found"
        assert redis_client.keys("kiln:job:*") == []


async def test_a_job_too_large_for_the_trainers_memory_is_refused_with_its_bytes(redis_server, tmp_path):
    small = Capacity(available_bytes=1000, base_shared_bytes=8, base_copied_bytes=0, token_bytes=100.0)
    async with stack(redis_server.url, tmp_path, ChainBackend(capacity=small)) as (client, _, _):
        with pytest.raises(KilnError) as caught:
            await client.submit(grpo_request())
        assert (caught.value.code, caught.value.kind.http_status) == ("job_exceeds_memory", 413)
        details = caught.value.details
        assert details["available_bytes"] == 1000
        assert details["total_bytes"] == sum(
            details[name] for name in ("adapter_bytes", "optimizer_bytes", "activation_bytes")
        )
        assert await client.list() == []


async def test_the_idempotency_key_is_honoured(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        request = grpo_request()
        request.idempotency_key = "k"
        ids = {(await client.submit(request)).id for _ in range(3)}
        assert len(ids) == 1
        request.config.epochs = 7
        assert await code_of(client.submit(request)) == "idempotency_conflict"


async def test_a_redis_that_could_lose_jobs_is_refused(redis_server, redis_client, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        redis_client.config_set("appendfsync", "everysec")
        try:
            assert await code_of(client.submit(grpo_request())) == "queue_not_durable"
        finally:
            redis_client.config_set("appendfsync", "always")
        assert await client.list() == []


async def test_a_running_job_outlives_redis(tmp_path):
    """Redis is killed mid-job: the steps go on, nothing accepted is lost, and the events catch up."""
    reached, redis_is_dead, stepped = threading.Event(), threading.Event(), threading.Event()

    def before_step(step):
        if step == 2:
            reached.set()
            assert redis_is_dead.wait(60)
        if step == 4:
            stepped.set()

    backend = ChainBackend(num_steps=5, before_step=before_step)
    with private_redis(tmp_path) as server:
        async with stack(server.url, tmp_path, backend) as (client, registry, _):
            job = await client.submit(grpo_request("helper", checkpoint_every=5))
            waiting = await client.submit(grpo_request("other"))
            assert await asyncio.to_thread(reached.wait, 60)
            server.kill()
            redis_is_dead.set()
            assert await asyncio.to_thread(stepped.wait, 60)
            assert await code_of(client.submit(grpo_request())) == "queue_unavailable"
            assert await code_of(client.get(job.id)) == "queue_unavailable"
            assert await code_of(client.status()) == "queue_unavailable"
            await asyncio.to_thread(server.start)
            for job_id in (job.id, waiting.id):
                events = await asyncio.wait_for(watch_all(client, job_id), 60)
                assert events[-1].type == "succeeded"
            steps = [point.step for point in (await client.get(job.id)).history]
            assert steps == [1, 2, 3, 4, 5]
            assert backend.steps_taken[:5] == [1, 2, 3, 4, 5]
            assert (await registry.resolve("helper")).version == 1


async def test_accepted_jobs_survive_a_sigkill_of_redis(tmp_path):
    with private_redis(tmp_path) as server:
        began, go_on = threading.Event(), threading.Event()

        def before_step(step):
            began.set()
            assert go_on.wait(60)

        async with stack(server.url, tmp_path, ChainBackend(before_step=before_step)) as (client, _, _):
            accepted = [(await client.submit(grpo_request(f"a{n}"))).id for n in range(8)]
            server.kill()
            server.start()
            found = connect(server.url)
            assert {job.id for job in await client.list()} == {*accepted}
            assert found.zcard("kiln:jobs:queued") >= 7
            go_on.set()
            for job_id in accepted:
                assert (await asyncio.wait_for(watch_all(client, job_id), 60))[-1].type == "succeeded"


async def test_an_absent_trainer_is_unavailable():
    client = TrainerClient("127.0.0.1:1", timeout_s=2.0)
    with pytest.raises(TrainerUnavailable) as caught:
        await client.submit(grpo_request())
    assert caught.value.kind.http_status == 503
    await client.close()
