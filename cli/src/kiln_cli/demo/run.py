"""`kiln demo`: starts its own stack, runs the whole loop, shows what it did."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from kiln_cli.demo.client import CountingClient, Sample, keep_chatting
from kiln_cli.demo.learning import Learner, LearningPlan, RoundResult
from kiln_cli.demo.prompts import HELD_OUT_PROMPTS, TRAINING_PROMPTS
from kiln_cli.demo.report import DemoReport
from kiln_cli.demo.reward import score
from kiln_cli.demo.statistics import Interval, mean_interval
from kiln_cli.errors import DemoFailed
from kiln_cli.up.console import UpConsole
from kiln_cli.up.options import build_options
from kiln_cli.up.specs import UpOptions, build_specs
from kiln_cli.up.state_dir import StateDirLock
from kiln_cli.up.supervisor import Supervisor
from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc import open_channel

ADAPTER, CONTROL = "courteous", "control"
SAMPLES_PER_PROMPT = 6
CHAT_PROMPTS = ["What is 17 + 25?", "Who are you?", "What is 9 + 4?"]
_START_TIMEOUT_S = 300.0  # a first start on a GPU compiles its kernels
_INTERRUPTED = 130


@dataclass(frozen=True)
class Evaluation:
    """Answers to the held-out prompts and their mean reward."""

    samples: list[Sample]
    reward: Interval


@contextlib.asynccontextmanager
async def running_stack(options: UpOptions, lock: StateDirLock) -> AsyncIterator[str]:
    """Run all services for the duration of the block; yields the gateway's URL."""
    url = f"http://127.0.0.1:{options.port}"
    log_dir = options.state_dir / "logs"
    console = UpConsole(url, log_dir, is_verbose=False)
    console.starting("the demo model" if options.is_demo_model else options.model, options.state_dir)
    supervisor = Supervisor(build_specs(options), options.state_dir, console, inherited_fds=[lock.fd])
    running = asyncio.create_task(supervisor.run())
    ready = asyncio.create_task(supervisor.wait_until_ready())
    try:
        await asyncio.wait({running, ready}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            if running.done():
                raise DemoFailed("the services could not start")
            raise DemoFailed(f"the services were not ready within {_START_TIMEOUT_S:g} s")
        yield url
    finally:
        ready.cancel()
        supervisor.request_stop()
        await running


async def evaluate(client: CountingClient, model: str, max_tokens: int) -> Evaluation:
    """Sample every held-out prompt SAMPLES_PER_PROMPT times from `model` and score the answers."""
    groups: Sequence[list[Sample]] = await asyncio.gather(
        *(
            client.sample(prompt, model=model, count=SAMPLES_PER_PROMPT, max_tokens=max_tokens)
            for prompt in HELD_OUT_PROMPTS
        )
    )
    samples = [sample for group in groups for sample in group]
    return Evaluation(samples, mean_interval([score(sample.prompt, sample.text) for sample in samples]))


async def base_checksum(engine_address: str) -> str:
    """Hash of the engine's base weights, computed by the engine over its memory."""
    async with open_channel(engine_address) as channel:
        answer = await engine_pb2_grpc.EngineStub(channel).ChecksumWeights(
            engine_pb2.ChecksumWeightsRequest(), timeout=60
        )
    return answer.sha256


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def _learn(
    client: CountingClient, base_model: str, plan: LearningPlan, report: DemoReport, seed: int
) -> list[RoundResult]:
    """The adapter and its control side by side, under ordinary traffic all the while."""
    stop = asyncio.Event()
    traffic = [asyncio.create_task(keep_chatting(client, CHAT_PROMPTS, stop)) for _ in range(2)]
    learner = Learner(client, ADAPTER, plan, shuffle_rewards=False, seed=seed)
    control = Learner(client, CONTROL, plan, shuffle_rewards=True, seed=seed + 1)
    try:
        results, _ = await asyncio.gather(
            learner.run(
                TRAINING_PROMPTS, base_model, lambda n, r: report.round("learning", n, plan.num_rounds, r)
            ),
            control.run(
                TRAINING_PROMPTS, base_model, lambda n, r: report.round("control", n, plan.num_rounds, r)
            ),
        )
    finally:
        stop.set()
        await asyncio.gather(*traffic)
    return results


async def _measure(client: CountingClient, model: str, plan: LearningPlan, report: DemoReport) -> Evaluation:
    found = await evaluate(client, model, plan.max_tokens)
    report.advance()
    return found


async def run_demo(
    options: UpOptions, lock: StateDirLock, plan: LearningPlan, seed: int
) -> tuple[dict[str, object], list[str]]:
    """The whole demonstration; returns what its last line prints, and the `shortfalls`."""
    report = DemoReport()
    report.reward_source()
    report.estimate(plan.num_rounds)
    started_s = time.monotonic()
    async with running_stack(options, lock) as url:
        engine_address = f"unix:{options.run_dir / 'engine'}.sock"
        checksum_before = await base_checksum(engine_address)
        client = CountingClient(url)
        try:
            models = (await client.request("GET", "/v1/models")).json()["data"]
            base_model = models[0]["id"]
            with report.progress(plan.num_rounds):
                report.step(f"measuring the base model on {len(HELD_OUT_PROMPTS)} held-out prompts …")
                before = await _measure(client, base_model, plan, report)
                report.step(
                    f"reward before: {before.reward.mean:.3f}; now learning, with chat traffic beside it\n"
                )
                rounds = await _learn(client, base_model, plan, report, seed)
                report.step("\n  measuring again …")
                after = await _measure(client, ADAPTER, plan, report)
                control = await _measure(client, CONTROL, plan, report)
        finally:
            await client.close()
        checksum_after = await base_checksum(engine_address)
    report.table(before.reward, after.reward, control.reward)
    report.examples(before.samples, after.samples)
    for failure in client.failures[:5]:
        report.step(f"failed: {failure}")
    swaps = sorted(result.swap_ms for result in rounds)
    result: dict[str, object] = {
        "reward_before": before.reward.as_dict(),
        "reward_after": after.reward.as_dict(),
        "control_after": control.reward.as_dict(),
        "rounds": plan.num_rounds,
        "train_seconds": round(sum(result.train_seconds for result in rounds), 2),
        "swap_ms": round(swaps[len(swaps) // 2], 1),
        "requests_total": client.num_requests,
        "requests_failed": client.num_failed,
        "base_sha256_before": checksum_before,
        "base_sha256_after": checksum_after,
        "adapter": after.samples[0].adapter,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    return result, shortfalls(before.reward, after.reward, client.num_failed, client.num_requests)


def shortfalls(before: Interval, after: Interval, num_failed: int, num_requests: int) -> list[str]:
    """What the demonstration did not show, one line each; none when it learned and lost no request."""
    lines = []
    if not after.is_above(before):
        how = "lies below" if after.high < before.low else "overlaps"
        lines.append(
            f"not learned: the reward's 95 % interval after learning, {after.low:.3f} to {after.high:.3f}, "
            f"{how} the one before, {before.low:.3f} to {before.high:.3f}"
        )
    if num_failed:
        lines.append(f"{num_failed} of {num_requests} requests failed")
    return lines


def demo(seed: int, state_dir: Path | None, plan: LearningPlan, *, as_json: bool = False) -> int:
    """Entry point of `kiln demo`. Exit code 1 when a request failed or nothing was learned.

    With `as_json`, all but the last line goes to standard error.

    Raises:
        DemoFailed: it could not be carried out; every process it started has ended.
    """
    with contextlib.ExitStack() as stack:
        folder = state_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kiln-demo-")))
        folder = folder.expanduser().resolve()
        lock = stack.enter_context(StateDirLock(folder))
        options = build_options(
            model=None,
            host="127.0.0.1",
            port=free_port(),
            state_dir=folder,
            served_model_name=None,
            device=None,
        )
        aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        try:
            with aside:
                result, missed = asyncio.run(run_demo(options, lock, plan, seed))
        except httpx.HTTPError as error:
            answer = error.response.text if isinstance(error, httpx.HTTPStatusError) else repr(error)
            raise DemoFailed(f"a request failed: {answer}") from error
        except KeyboardInterrupt:
            print("stopped before the end; nothing of it is still running", file=sys.stderr)
            return _INTERRUPTED
    for line in missed:
        print(line, file=sys.stderr if as_json else sys.stdout)
    print(json.dumps(result))
    return 1 if missed else 0
