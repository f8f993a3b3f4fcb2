"""Doing a job again, over gRPC, with a real registry and Redis and a backend that adds up its steps."""

import asyncio

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from kiln_common.bus import keys
from kiln_common.pb import trainer_pb2
from tests.integration.jobs.test_trainer_service import code_of, stack, watch_all
from tests.support.jobs import WAIT_S, ChainBackend, grpo_request, wait_until


@pytest.fixture(autouse=True)
def _empty_queue(redis_client):
    return redis_client


async def ended(client, job_id):
    await asyncio.wait_for(watch_all(client, job_id), WAIT_S)
    return await client.get(job_id)


def retry(job_id, *paths, key="", **changes):
    return trainer_pb2.RetryJobRequest(
        id=job_id,
        changes=trainer_pb2.JobConfig(**changes),
        changed=FieldMask(paths=paths),
        idempotency_key=key,
    )


async def test_a_retry_starts_where_the_first_one_started_whatever_came_in_between(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        first = await ended(client, (await client.submit(grpo_request("helper"))).id)
        second = await ended(client, (await client.submit(grpo_request("helper"))).id)
        assert (first.resolved_base_adapter, second.resolved_base_adapter) == ("", "helper@1")
        again = await ended(client, (await client.retry(retry(first.id))).id)
        assert (again.retry_of, again.resolved_base_adapter, again.config.start_fresh) == (first.id, "", True)
        assert again.id != first.id
        assert again.result.version == 3
        assert again.config.optimizer == first.config.optimizer
        on = await ended(client, (await client.retry(retry(second.id))).id)
        assert (on.resolved_base_adapter, on.config.base_adapter) == ("helper@1", "helper@1")


async def test_settings_change_and_everything_else_stays(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        request = grpo_request("helper", epochs=2, metadata_json='{"run": 1}')
        first = await ended(client, (await client.submit(request)).id)
        changes = retry(
            first.id,
            "optimizer.learning_rate",
            "lora",
            "base_adapter",
            optimizer=trainer_pb2.OptimizerConfig(learning_rate=0.25, weight_decay=0.5),
            lora=trainer_pb2.LoraConfig(rank=3, targets=["mlp"]),
            base_adapter="helper@1",
            epochs=7,
        )
        again = await ended(client, (await client.retry(changes)).id)
        assert (again.config.optimizer.learning_rate, again.config.optimizer.weight_decay) == (0.25, 0.0)
        assert (again.config.lora.rank, [*again.config.lora.targets]) == (3, ["mlp"])
        assert (again.config.epochs, again.config.metadata_json) == (2, '{"run": 1}')
        assert again.resolved_base_adapter == "helper@1"
        assert again.grpo_loss == first.grpo_loss
        assert await code_of(client.retry(retry(first.id, "optimizer.speed"))) == "invalid_job_config"
        assert await code_of(client.retry(retry(first.id, "epochs", epochs=-1))) == "invalid_job_config"


async def test_one_key_makes_one_retry(redis_server, tmp_path):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        first = await ended(client, (await client.submit(grpo_request())).id)
        ids = {(await client.retry(retry(first.id, key="again"))).id for _ in range(2)}
        assert len(ids) == 1


async def test_what_cannot_be_done_again_says_why(redis_server, redis_client, tmp_path):
    held = asyncio.Event()
    backend = ChainBackend(before_step=lambda step: wait_until(held.is_set))
    async with stack(redis_server.url, tmp_path, backend) as (client, _, _):
        job = await client.submit(grpo_request())
        assert await code_of(client.retry(retry(job.id))) == "job_not_ended"
        held.set()
        await ended(client, job.id)
        assert await code_of(client.retry(retry("job_none"))) == "job_not_found"
        redis_client.delete(keys.job_payload(job.id))
        assert await code_of(client.retry(retry(job.id))) == "payload_gone"
