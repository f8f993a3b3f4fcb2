"""What a worker thread asks of a real engine and a real registry for a student that is sampled."""

import asyncio
import contextlib
import threading

import pytest

from kiln_common.clients.engine import EngineClient
from kiln_common.errors import AdapterNotFound, KilnError, Overloaded
from kiln_common.pb import engine_pb2
from kiln_trainer.domain.errors import JobCancelled
from kiln_trainer.publishing import EngineDirectory, GrpcPublisher
from tests.support.engine_server import StubbornRunner, generate_request, make_parts, running_engine
from tests.support.jobs import MemoryContent
from tests.support.registry import adapter_bytes, publish_header, running_registry


@contextlib.asynccontextmanager
async def connected(tmp_path, runner=None):
    """Yields (publisher, registry client, engine client)."""
    parts = make_parts(runner or StubbornRunner())
    async with (
        running_registry(tmp_path / "registry") as registry,
        running_engine(parts, tmp_path) as (_, client),
    ):
        directory = EngineDirectory(
            (client.address,), info_timeout_s=10.0, live_timeout_s=10.0, rollout_timeout_s=30.0
        )
        try:
            yield GrpcPublisher(registry, directory, asyncio.get_running_loop()), registry, client
        finally:
            await directory.close()


def nothing_to_say():
    pass


async def test_completions_come_back_in_the_order_of_their_requests(tmp_path):
    requests = [generate_request(f"r{i}", range(10, 12 + i), max_tokens=1 + i % 3) for i in range(20)]
    async with connected(tmp_path) as (publisher, _, _):
        found = await asyncio.to_thread(publisher.generate, requests, nothing_to_say)
    assert {request.timeout_s for request in requests} == {30.0}
    for number, outputs in enumerate(found):
        assert {output.request_id for output in outputs} == {f"r{number}"}
        assert sum(len(output.token_ids) for output in outputs) == 1 + number % 3
        assert outputs[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH


async def test_what_the_check_raises_ends_the_requests(tmp_path):
    runner = StubbornRunner()
    runner.hold_after(2)
    is_cancelled = threading.Event()

    def check():
        if is_cancelled.is_set():
            raise JobCancelled("cancelled")

    requests = [generate_request(f"r{i}", max_tokens=50) for i in range(3)]
    async with connected(tmp_path, runner) as (publisher, _, client):
        running = asyncio.create_task(asyncio.to_thread(publisher.generate, requests, check))
        assert await asyncio.to_thread(runner.wait_until_held, 60)
        is_cancelled.set()
        with pytest.raises(JobCancelled):
            await running
        runner.let_go()
        async with asyncio.timeout(60):
            while (await client.get_stats()).num_running:
                await asyncio.sleep(0.01)


async def test_a_draw_that_fails_half_way_costs_no_other(tmp_path, monkeypatch):
    generate, asked_for = EngineClient.generate, []

    async def fail_once(self, request):
        asked_for.append(request.request_id)
        async with contextlib.aclosing(generate(self, request)) as outputs:
            async for output in outputs:
                if request.request_id == "r1":
                    raise Overloaded("all adapter slots are in use")
                yield output

    monkeypatch.setattr(EngineClient, "generate", fail_once)
    requests = [generate_request(f"r{i}", max_tokens=8) for i in range(3)]
    async with connected(tmp_path) as (publisher, _, _):
        found = await asyncio.to_thread(publisher.generate, requests, nothing_to_say)
    assert [sum(len(output.token_ids) for output in outputs) for outputs in found] == [8] * 3
    assert asked_for[:3] == ["r0", "r1", "r2"]
    assert [{output.request_id for output in outputs} for outputs in found] == [
        {"r0"}, {asked_for[3]}, {"r2"},
    ]  # fmt: skip


async def test_a_withdrawn_student_is_gone_and_one_that_never_was_is_no_error(tmp_path):
    content = MemoryContent(adapter_bytes())
    async with connected(tmp_path) as (publisher, registry, _):
        await asyncio.to_thread(publisher.withdraw, "job_1")
        for _ in range(2):
            await asyncio.to_thread(publisher.publish, publish_header("job_1"), content)
        await asyncio.to_thread(publisher.withdraw, "job_1")
        with pytest.raises(KilnError) as caught:
            await registry.resolve("job_1")
    assert caught.value.code == AdapterNotFound.code
