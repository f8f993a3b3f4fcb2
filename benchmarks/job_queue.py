"""Whether every job ends exactly once: `python -m benchmarks.job_queue --jobs 500 --trainers 3 --kills 2`.

Starts `kiln up` on the demo model with more trainers beside its own, queues small supervised jobs, each
of them submitted twice under one idempotency key, and kills (SIGKILL) trainers at random moments. Ends
with status 1 unless each job succeeded with one last event, and its adapter has one version of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kiln_cli.up.options import make_run_dir
from kiln_common.clients.registry import RegistryClient
from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import KilnError
from kiln_common.pb import trainer_pb2
from tests.support.stack import Stack

_POLL_S = 0.2
_PATIENCE_S = 60.0
_FINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Verdict:
    """What became of the jobs; `problems` is empty where each ended exactly once."""

    num_jobs: int
    num_claims: int = 0
    num_taken_over: int = 0
    problems: list[str] = field(default_factory=list)


def small_job(number: int, num_adapters: int) -> trainer_pb2.SubmitRequest:
    """A supervised job of a few tokens and steps, on one of `num_adapters` names."""
    examples = [
        trainer_pb2.SftExample(token_ids=[1 + (number + i) % 200, 2, 3, 4], loss_weights=[0, 1, 1, 1])
        for i in range(4)
    ]
    config = trainer_pb2.JobConfig(
        adapter=f"queue-{number % num_adapters}",
        lora=trainer_pb2.LoraConfig(rank=2, targets=["attention"]),
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-3),
        epochs=1,
        batch_tokens=16,
        gradient_accumulation=1,
        checkpoint_every=2,
        seed=number,
    )
    return trainer_pb2.SubmitRequest(
        config=config, sft=trainer_pb2.SftSpec(examples=examples), idempotency_key=f"job-{number}"
    )


async def submit_twice(
    client: TrainerClient, requests: Sequence[trainer_pb2.SubmitRequest], problems: list[str]
) -> list[str]:
    """The id of each job; that both submissions gave the same one is checked."""
    ids = []
    for request in requests:
        first, again = await client.submit(request), await client.submit(request)
        if first.id != again.id:
            problems.append(f"{request.idempotency_key} made {first.id} and {again.id}")
        ids.append(first.id)
    return ids


async def until_ended(client: TrainerClient, ids: Sequence[str], on_progress: Callable[[int], None]) -> None:
    """Wait for the last job; `on_progress` hears how many have ended, now and then.

    A trainer that is away is waited for. Raises TimeoutError when nothing has ended for a minute.
    """
    wanted, best, last_s = {*ids}, -1, time.monotonic()
    while best < len(wanted):
        try:
            jobs = await client.list(2 * len(wanted), _FINAL)
        except KilnError:
            jobs = []
        num_ended = sum(job.id in wanted for job in jobs)
        if num_ended > best:
            best, last_s = num_ended, time.monotonic()
            on_progress(best)
        if time.monotonic() - last_s > _PATIENCE_S:
            raise TimeoutError(f"{best} of {len(wanted)} jobs ended, and then none for {_PATIENCE_S:.0f} s")
        await asyncio.sleep(_POLL_S)


async def verdict_of(client: TrainerClient, registry: RegistryClient, ids: Sequence[str]) -> Verdict:
    """Compare every job's status and events, and the registry's versions, with what must hold."""
    verdict = Verdict(num_jobs=len(ids))
    if len({*ids}) != len(ids):
        verdict.problems.append(f"{len(ids)} jobs have {len({*ids})} ids")
    versions = [version for adapter in await registry.list() for version in adapter.versions]
    by_job = Counter(version.job_id for version in versions)
    for job_id in ids:
        job = await client.get(job_id)
        types = Counter([event.type async for event in client.watch(job_id)])
        verdict.num_claims += job.claim_epoch
        verdict.num_taken_over += job.claim_epoch > 1
        if job.status != "succeeded":
            verdict.problems.append(f"{job_id} {job.status}: {job.error.code} {job.error.message}")
        if sum(types[status] for status in _FINAL) != 1:
            verdict.problems.append(f"{job_id} ended {dict(types)}")
        if by_job[job_id] != 1:
            verdict.problems.append(f"{job_id} has {by_job[job_id]} versions")
    return verdict


def kill_moments(num_jobs: int, num_kills: int, draw: random.Random) -> list[int]:
    """How many jobs have ended when each kill comes, soonest first."""
    return sorted(
        draw.sample(range(max(1, num_jobs // 10), max(num_kills + 1, num_jobs * 3 // 4)), num_kills)
    )


class MoreTrainers:
    """Trainer processes beside the one of a running stack, over the same folder, queue and engine."""

    def __init__(self, state_dir: Path, count: int) -> None:
        run_dir = make_run_dir(state_dir)
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(count):
            env = {
                "KILN_TRAINER_LISTEN": f"unix:{run_dir}/trainer-{number}.sock",
                "KILN_TRAINER_STATE_DIR": str(state_dir / "trainer"),
                "KILN_TRAINER_REDIS_URL": f"unix://{run_dir}/redis.sock",
                "KILN_TRAINER_REGISTRY_ADDRESS": f"unix:{run_dir}/registry.sock",
                "KILN_TRAINER_ENGINE_ADDRESSES": f"unix:{run_dir}/engine.sock",
            }
            with (state_dir / f"trainer-{number}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "kiln_trainer"],
                        env={**os.environ, **env},
                        stdout=log,
                        stderr=log,
                    )
                )

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)


async def run(num_jobs: int, num_trainers: int, num_kills: int, num_adapters: int, seed: int) -> Verdict:
    """The whole run, on a stack of its own."""
    draw = random.Random(seed)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kiln-queue-") as folder:
        state_dir = Path(folder)
        with Stack(state_dir) as stack:
            run_dir = make_run_dir(state_dir)
            client = TrainerClient(f"unix:{run_dir}/trainer.sock")
            registry = RegistryClient(f"unix:{run_dir}/registry.sock")
            more = MoreTrainers(state_dir, num_trainers - 1)
            try:
                requests = [small_job(number, num_adapters) for number in range(num_jobs)]
                started_s = time.monotonic()
                ids = await submit_twice(client, requests, problems)
                print(f"{num_jobs} jobs submitted twice in {time.monotonic() - started_s:.1f} s")
                moments = kill_moments(num_jobs, num_kills, draw)
                victims = draw.sample([-1, *range(num_trainers - 1)], num_kills)

                def on_progress(num_ended: int) -> None:
                    while moments and num_ended >= moments[0]:
                        moments.pop(0)
                        victim = victims.pop()
                        pid = stack.kill("trainer") if victim < 0 else more.processes[victim].pid
                        if victim >= 0:
                            os.kill(pid, signal.SIGKILL)
                        print(f"killed trainer {pid} after {num_ended} jobs")

                await until_ended(client, ids, on_progress)
                print(f"all have ended after {time.monotonic() - started_s:.1f} s")
                verdict = await verdict_of(client, registry, ids)
            finally:
                more.stop()
                await client.close()
                await registry.close()
    verdict.problems += problems
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--trainers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    verdict = asyncio.run(run(options.jobs, options.trainers, options.kills, options.adapters, options.seed))
    print(f"{verdict.num_jobs} jobs, {verdict.num_claims} claims, {verdict.num_taken_over} taken over")
    for problem in verdict.problems:
        print(problem)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
