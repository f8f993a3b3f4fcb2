"""Training over gRPC by a client that has nothing of ours: the example in docs/, and its streams."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time

import grpc
import pytest

from kiln_common.pb import trainer_pb2, trainer_pb2_grpc
from tests.integration.jobs.test_trainer_service import stack
from tests.support.gateway import REPOSITORY
from tests.support.jobs import ChainBackend, grpo_request, opd_request, sft_request

EXAMPLE = REPOSITORY / "docs/examples/train_over_grpc.py"


@pytest.fixture(autouse=True)
def _empty_queue(redis_client):
    return redis_client


@pytest.fixture
def data(tmp_path):
    rows = [{"token_ids": [1, 2, 3, 4], "num_prompt_tokens": 2} for _ in range(200)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def run_example(client, *arguments):
    """The example's lines; run without our packages on its path."""
    command = [sys.executable, "-I", str(EXAMPLE), *map(str, arguments)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextlib.asynccontextmanager
async def plain_stub(*arguments, **settings):
    """Yields (stub on a channel without our options, our client)."""
    async with (
        stack(*arguments, **settings) as (client, _, _),
        grpc.aio.insecure_channel(client.address) as channel,
    ):
        yield trainer_pb2_grpc.TrainerStub(channel), client


def test_the_example_imports_nothing_of_ours():
    assert "import kiln" not in EXAMPLE.read_text()
    assert "from kiln" not in EXAMPLE.read_text()


async def test_the_example_streams_a_file_and_watches_its_job(redis_server, tmp_path, data):
    async with stack(redis_server.url, tmp_path) as (client, registry, _):
        lines = await run_example(client, client.address, data, "helper")
        job_id, status, version, sha256 = lines[-1].split()
        assert lines[0] in (f"{job_id} queued", f"{job_id} running")
        assert (status, version) == ("succeeded", "helper@1")
        assert [line.split()[1] for line in lines if line.startswith("step")] == ["1", "2", "3", "4"]
        assert (await registry.resolve("helper")).sha256 == sha256


async def test_the_example_cancels_its_job(redis_server, tmp_path, data):
    backend = ChainBackend(num_steps=500, before_step=lambda step: time.sleep(0.02))
    async with stack(redis_server.url, tmp_path, backend) as (client, _, _):
        lines = await run_example(client, client.address, data, "helper", "--cancel-after", "3")
        assert lines[-1].split()[1] == "cancelled"
        assert len(backend.steps_taken) < 500


async def test_a_stream_is_the_request_it_spells_out(redis_server, tmp_path):
    async with plain_stub(redis_server.url, tmp_path) as (stub, client):
        for request in (sft_request("a"), grpo_request("b"), opd_request("c")):
            whole = await client.submit(request)
            documents = {
                "sft": [{"sft_example": each} for each in request.sft.examples],
                "grpo": [{"grpo_group": each} for each in request.grpo.groups],
                "opd": [{"opd_prompt": each} for each in request.opd.prompts],
            }[request.WhichOneof("recipe")]
            parts = [trainer_pb2.SubmitPart(**document) for document in documents]
            for spec, name in ((request.sft, "examples"), (request.grpo, "groups"), (request.opd, "prompts")):
                if getattr(spec, name):
                    spec.ClearField(name)
            streamed = await stub.SubmitStream(iter([trainer_pb2.SubmitPart(settings=request), *parts]))
            assert streamed.payload_sha256 == whole.payload_sha256


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [trainer_pb2.SubmitPart(sft_example=trainer_pb2.SftExample(token_ids=[1]))],
        [trainer_pb2.SubmitPart(settings=trainer_pb2.SubmitRequest())],
        [trainer_pb2.SubmitPart(settings=sft_request()), trainer_pb2.SubmitPart(settings=sft_request())],
        [
            trainer_pb2.SubmitPart(settings=sft_request()),
            trainer_pb2.SubmitPart(opd_prompt=trainer_pb2.OpdPrompt(token_ids=[1])),
        ],
    ],
)
async def test_a_stream_that_makes_no_sense_is_refused_with_its_code(redis_server, tmp_path, messages):
    async with plain_stub(redis_server.url, tmp_path) as (stub, client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SubmitStream(iter(messages))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert b"invalid_submit_stream" in dict(caught.value.trailing_metadata())["kiln-error-bin"]
        assert await client.list() == []


async def test_a_stream_ends_where_it_becomes_too_large(redis_server, tmp_path):
    async with plain_stub(redis_server.url, tmp_path, max_payload_bytes=5_000) as (stub, _):
        sent = []

        def messages():
            yield trainer_pb2.SubmitPart(settings=sft_request())
            for number in range(100_000):
                sent.append(number)
                example = trainer_pb2.SftExample(token_ids=[1] * 100, loss_weights=[1.0] * 100)
                yield trainer_pb2.SubmitPart(sft_example=example)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SubmitStream(messages())
        assert b"payload_too_large" in dict(caught.value.trailing_metadata())["kiln-error-bin"]
        assert len(sent) < 100_000
