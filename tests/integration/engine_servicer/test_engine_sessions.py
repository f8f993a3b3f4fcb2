"""Clients and the engine over real gRPC; only the model is a stand-in."""

import asyncio
import contextlib

import grpc
import pytest

from kiln_common.errors import EngineUnavailable, KilnError
from kiln_common.pb import common_pb2, engine_pb2, engine_pb2_grpc
from kiln_common.rpc import open_channel
from kiln_engine.simulation.runner import SimulatedRunner
from tests.support.engine_server import (
    VOCAB_SIZE,
    StubbornRunner,
    collect,
    generate_request,
    make_parts,
    running_engine,
)


async def until(condition, what: str, timeout_s: float = 60.0):
    """Wait for something another task or process brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def num_tokens(outputs) -> int:
    """Tokens of a request's outputs: one of them has all that a step has drawn for it."""
    return sum(len(output.token_ids) for output in outputs)


async def read_to_end(session):
    while await session.read() is not grpc.aio.EOF:
        pass


@pytest.fixture
async def engine(tmp_path):
    runner = StubbornRunner()
    async with running_engine(make_parts(runner), tmp_path) as (running, client):
        running.runner = runner
        running.address = client.address
        yield running, client


async def test_a_request_streams_to_its_finish_reason(engine):
    _, client = engine
    outputs = await collect(client, generate_request(max_tokens=5, num_top_logprobs=2))
    assert num_tokens(outputs) == 5
    assert all(output.token_ids for output in outputs)
    assert {output.finish_reason for output in outputs[:-1]} == {0}
    assert outputs[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH
    assert outputs[0].seed == 1
    assert len(outputs[0].top_logprobs[0].token_ids) == 2


async def test_the_prefix_cache_shows_in_the_first_output(engine):
    _, client = engine
    await collect(client, generate_request("a", range(40)))
    outputs = await collect(client, generate_request("b", range(40)))
    assert outputs[0].num_cached_tokens == 32


async def test_many_requests_share_one_stream_and_one_message_per_step(engine):
    running, client = engine
    running.runner.hold()
    tasks = [
        asyncio.create_task(collect(client, generate_request(f"r{i}", [i] * 5, max_tokens=6)))
        for i in range(8)
    ]
    await until(lambda: running.intake.num_live == 8, "all requests to arrive")
    running.runner.let_go()
    for outputs in await asyncio.gather(*tasks):
        assert num_tokens(outputs) == 6
    assert max(len(plan.decode_rows) + len(plan.verify_rows) for plan in running.runner.plans) == 8


async def test_a_refused_request_leaves_the_session_to_the_others(engine):
    _, client = engine
    good = asyncio.create_task(collect(client, generate_request("good", max_tokens=20)))
    [refusal] = await collect(client, generate_request("bad", [VOCAB_SIZE]))
    assert refusal.finish_reason == engine_pb2.FINISH_REASON_ERROR
    assert refusal.error.code == "invalid_token_ids"
    assert "100" in refusal.error.message
    assert refusal.error.param == "prompt_token_ids"
    assert num_tokens(await good) == 20


async def test_closing_the_iterator_aborts_the_request(engine):
    running, client = engine
    running.runner.hold_after(3)
    async with contextlib.aclosing(client.generate(generate_request(max_tokens=200))) as outputs:
        async for _ in outputs:
            break
        # Or the loop, still on its way there, might see the abort before the request after it.
        assert await asyncio.to_thread(running.runner.wait_until_held, 60)
    # The abort travels before this one does.
    after = asyncio.create_task(collect(client, generate_request("after", max_tokens=1)))
    await until(lambda: running.intake.num_live == 2, "the request after it")
    running.runner.let_go()
    await after
    await until(lambda: running.intake.num_live == 0, "the abort")
    assert len(running.runner.plans) < 10


async def test_cancelling_the_reader_aborts_the_request(engine):
    running, client = engine
    running.runner.hold()
    reader = asyncio.create_task(collect(client, generate_request(max_tokens=200)))
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    reader.cancel()
    running.runner.let_go()
    await until(lambda: running.intake.num_live == 0, "the abort")


async def test_a_session_that_goes_away_takes_its_requests_along(engine):
    running, client = engine
    other = open_channel(running.address)
    session = engine_pb2_grpc.EngineStub(other).Session()
    submit = engine_pb2.SessionRequest(submit=generate_request("gone", max_tokens=230))
    running.runner.hold()
    await session.write(submit)
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    await other.close()
    running.runner.let_go()
    await until(lambda: running.intake.num_live == 0, "the requests of the session to end")
    assert num_tokens(await collect(client, generate_request("stays"))) == 4


async def test_half_closing_a_session_ends_it(engine):
    running, _ = engine
    async with open_channel(running.address) as channel:
        session = engine_pb2_grpc.EngineStub(channel).Session()
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF


async def test_a_duplicate_id_is_refused_across_sessions(engine):
    running, client = engine
    running.runner.hold()
    first = asyncio.create_task(collect(client, generate_request("same")))
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    async with open_channel(running.address) as channel:
        call = engine_pb2_grpc.EngineStub(channel).Generate(generate_request("same"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.ABORTED
    running.runner.let_go()
    assert num_tokens(await first) == 4


async def test_generate_streams_one_request_without_a_session(engine):
    running, _ = engine
    async with open_channel(running.address) as channel:
        outputs = [o async for o in engine_pb2_grpc.EngineStub(channel).Generate(generate_request())]
    assert num_tokens(outputs) == 4
    assert outputs[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH
    assert running.intake.num_live == 0


async def test_a_deadline_ends_a_running_request(engine):
    _, client = engine
    outputs = await collect(client, generate_request(max_tokens=200, timeout_s=1e-6))
    assert outputs[-1].error.code == "deadline_exceeded"


async def test_a_failed_step_reaches_the_client_and_the_engine_goes_on(engine):
    running, client = engine
    running.runner.num_failures_left = 1
    [failure] = await collect(client, generate_request("a"))
    assert failure.error.code == "engine_failed"
    assert num_tokens(await collect(client, generate_request("b"))) == 4


async def test_an_engine_that_keeps_failing_asks_to_be_restarted(engine):
    running, client = engine
    running.runner.num_failures_left = 3
    for name in ("a", "b", "c"):
        await collect(client, generate_request(name))
    async with asyncio.timeout(60):
        await running.has_failed.wait()
    [refusal] = await collect(client, generate_request("d"))
    assert refusal.error.code == "engine_failed"


async def test_a_client_that_does_not_read_loses_its_requests(tmp_path):
    runner = StubbornRunner()
    async with running_engine(make_parts(runner), tmp_path, outbox_steps=2) as (running, client):
        async with open_channel(client.address) as channel:
            session = engine_pb2_grpc.EngineStub(channel).Session()
            runner.hold()
            for number in range(8):
                request = generate_request(
                    f"r{number}", [number], max_tokens=240, num_top_logprobs=20, ignore_eos=True
                )
                await session.write(engine_pb2.SessionRequest(submit=request))
            await until(lambda: running.intake.num_live == 8, "the requests to arrive")
            runner.let_go()
            await until(lambda: running.intake.num_live == 0, "the requests to be cancelled")
            assert len(runner.plans) < 240
            with pytest.raises(grpc.aio.AioRpcError) as overflow:
                await read_to_end(session)
        assert overflow.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert num_tokens(await collect(client, generate_request("other", max_tokens=2))) == 2


async def test_draining_lets_running_requests_end_and_refuses_new_ones(engine):
    running, client = engine
    running.runner.hold()
    started = asyncio.create_task(collect(client, generate_request("started")))
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    draining = asyncio.create_task(client.drain(30.0))
    await until(lambda: running.intake.is_draining, "the drain to begin")
    [refusal] = await collect(client, generate_request("new"))
    assert refusal.error.code == "engine_draining"
    running.runner.let_go()
    answer = await draining
    assert (answer.num_finished, answer.num_aborted) == (1, 0)
    assert num_tokens(await started) == 4
    assert (await client.get_stats()).is_draining


async def test_a_drain_that_takes_too_long_hands_requests_back(engine):
    running, client = engine
    running.runner.hold()
    started = asyncio.create_task(collect(client, generate_request("long", max_tokens=200)))
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    draining = asyncio.create_task(client.drain(0.05))
    await until(lambda: running.intake.is_draining, "the drain to begin")
    await until(lambda: running.intake._num_handed_back == 1, "the end of its time")
    running.runner.let_go()
    assert (await draining).num_aborted == 1
    last = (await started)[-1]
    assert (last.finish_reason, last.error.code) == (engine_pb2.FINISH_REASON_ERROR, "answer_handed_back")


async def test_info_stats_checksum_and_weights(engine):
    _, client = engine
    await collect(client, generate_request(max_tokens=3))
    info = await client.get_info()
    assert (info.boot_id, info.base_model.model_id) == ("boot", "tiny")
    stats = await client.get_stats()
    assert (stats.num_generated_tokens, stats.num_prompt_tokens, stats.num_running) == (3, 20, 0)
    assert sum(stats.step_seconds.counts) == stats.num_steps >= 3
    assert 0 < stats.step_seconds.sum < stats.uptime_s
    assert stats.num_adapter_slots == info.num_adapter_slots
    assert (await client.checksum()).sha256 == "cd" * 32
    assert (await client.share_weights()).socket_path == "/nowhere/weights.sock"


async def test_an_adapter_without_a_registry_is_unavailable(engine):
    _, client = engine
    adapter = common_pb2.AdapterRef(name="a", version=1, sha256="ab" * 32)
    [failure] = await collect(client, generate_request(adapters=[adapter]))
    assert failure.error.code == "adapter_unavailable"
    with pytest.raises(KilnError) as caught:
        await client.prepare_adapter(adapter)
    assert caught.value.code == "adapter_unavailable"


async def test_a_client_survives_a_restart_of_its_engine(tmp_path):
    runner = StubbornRunner()
    parts = make_parts(runner)
    async with running_engine(parts, tmp_path) as (running, client):
        runner.hold()
        cut_off = asyncio.create_task(collect(client, generate_request("cut", max_tokens=200)))
        await until(lambda: running.intake.num_live == 1, "the request to arrive")
        await running.server.grpc.stop(0)
        with pytest.raises(EngineUnavailable):
            await cut_off
        with pytest.raises(EngineUnavailable):
            await collect(client, generate_request("away"))
        async with running_engine(make_parts(SimulatedRunner(vocab_size=VOCAB_SIZE)), tmp_path):
            async with asyncio.timeout(60):
                while True:
                    try:
                        outputs = await collect(client, generate_request("again"))
                    except EngineUnavailable:
                        await asyncio.sleep(0.05)
                    else:
                        break
            assert num_tokens(outputs) == 4


async def test_one_id_at_a_time_per_client(engine):
    running, client = engine
    running.runner.hold()
    first = asyncio.create_task(collect(client, generate_request("same")))
    await until(lambda: running.intake.num_live == 1, "the request to arrive")
    with pytest.raises(KilnError, match="is running"):
        await collect(client, generate_request("same"))
    running.runner.let_go()
    assert num_tokens(await first) == 4
