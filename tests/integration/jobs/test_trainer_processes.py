"""Two trainer processes on one queue: SIGKILL one mid-job, and the other carries the job on, once."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.job_queue import kill_moments, small_job, submit_twice, until_ended, verdict_of
from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import KilnError
from tests.support.fake_engine import running_engine
from tests.support.jobs import grpo_request, wait_until
from tests.support.registry import running_registry
from tests.support.stack import free_port

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("redis_client")]

STEP_S = 0.1


def start_trainer_process(
    tmp_path, env: dict[str, str], step_s: float = STEP_S
) -> tuple[subprocess.Popen, TrainerClient]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.chain_trainer", str(step_s)],
        env={**os.environ, **env, "KILN_TRAINER_LISTEN": f"127.0.0.1:{port}"},
        cwd=Path(__file__).parents[3],
        stderr=(tmp_path / f"trainer-{port}.log").open("w"),
    )
    return process, TrainerClient(f"127.0.0.1:{port}")


async def until_answer(call, timeout_s=60.0):
    """The first answer a starting service gives."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return await call()
            except KilnError:
                await asyncio.sleep(0.05)


async def test_forty_jobs_end_once_each_though_two_of_three_trainers_are_killed(redis_server, tmp_path):
    """The short form of `python -m benchmarks.job_queue`, without torch."""
    async with running_registry(tmp_path / "registry") as registry, running_engine() as engine:
        env = {
            "KILN_TRAINER_REDIS_URL": redis_server.url,
            "KILN_TRAINER_REGISTRY_ADDRESS": registry.address,
            "KILN_TRAINER_ENGINE_ADDRESSES": engine.address,
            "KILN_TRAINER_STATE_DIR": str(tmp_path / "trainer"),
            "KILN_TRAINER_CLAIM_TIMEOUT_S": "1.5",
        }
        trainers = [start_trainer_process(tmp_path, env, step_s=0.005) for _ in range(3)]
        (survivor, client), *victims = trainers
        draw, problems, killed = random.Random(3), [], []
        moments = kill_moments(40, len(victims), draw)

        def on_progress(num_ended):
            while moments and num_ended >= moments[0]:
                moments.pop(0)
                process, _ = victims[len(killed)]
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process)

        try:
            for _, each in trainers:
                await until_answer(each.status)
            ids = await submit_twice(client, [small_job(number, 8) for number in range(40)], problems)
            await until_ended(client, ids, on_progress)
            verdict = await verdict_of(client, registry, ids)
            assert problems + verdict.problems == []
            assert (len(killed), survivor.poll()) == (2, None)
        finally:
            for process, each in trainers:
                await each.close()
                process.kill()
                process.wait()


async def run_to_end(client, job_id):
    async with asyncio.timeout(60):
        return [event async for event in client.watch(job_id)]


async def test_a_killed_trainers_job_is_resumed_by_another_with_the_same_result(redis_server, tmp_path):
    async with running_registry(tmp_path / "registry") as registry, running_engine() as engine:
        env = {
            "KILN_TRAINER_REDIS_URL": redis_server.url,
            "KILN_TRAINER_REGISTRY_ADDRESS": registry.address,
            "KILN_TRAINER_ENGINE_ADDRESSES": engine.address,
            "KILN_TRAINER_STATE_DIR": str(tmp_path / "trainer"),
            "KILN_TRAINER_CLAIM_TIMEOUT_S": "0.6",
        }
        first, first_client = start_trainer_process(tmp_path, env)
        second = None
        try:
            await until_answer(first_client.status)
            request = grpo_request("helper")
            undisturbed = await first_client.submit(request)
            assert (await run_to_end(first_client, undisturbed.id))[-1].type == "succeeded"

            job = await first_client.submit(request)
            async with asyncio.timeout(60):
                async for event in first_client.watch(job.id):
                    if event.type == "checkpoint":
                        break
                os.kill(first.pid, signal.SIGKILL)
            second, client = start_trainer_process(tmp_path, env)
            await until_answer(client.status)
            events = await run_to_end(client, job.id)

            assert events[-1].type == "succeeded"
            assert [e.type for e in events].count("claimed") == 2
            assert [e.type for e in events].count("started") == 1
            assert [e.type for e in events].count("published") == 1
            done = await client.get(job.id)
            assert done.claim_epoch == 2
            assert [point.step for point in done.history] == [1, 2, 3, 4, 5, 6, 7, 8]
            # Version 2 has the bytes of the undisturbed run's version 1, and there is no third.
            versions = (await registry.get("helper")).versions
            assert [v.version for v in versions] == [1, 2]
            assert versions[0].sha256 == versions[1].sha256 == done.result.sha256
            assert engine.prepared == ["helper@1", "helper@2"]
            jobs_dir = tmp_path / "trainer" / "jobs"
            await asyncio.to_thread(wait_until, lambda: not any(jobs_dir.iterdir()))

            second.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(second.wait, 60) == 0
            await client.close()
        finally:
            await first_client.close()
            for process in (first, second):
                if process is not None:
                    process.kill()
                    process.wait()
