"""What routing by prefix keeps of one engine's cache: `python -m benchmarks.routing`.

64 conversations of 4 turns (a start of 1,024 tokens, turns of 64), and 64 single requests between
them, 16 clients: once with one engine, then with four behind one gateway, and behind three that each
turn of a conversation comes to in turn. Gateways' pools, gRPC, engines' servicers, loops, schedulers
and their words on Redis are the real ones; the engines have no model (benchmarks/http/paced_engine.py).
Exit status 1 when four engines have less than 90 % of the hit rate of one, or one of them more than
1.25 times the mean of the requests. Rows go to benchmarks/results/routing.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from benchmarks.engine.results import ResultFile
from benchmarks.http.paced_engine import make_parts, parse_options
from benchmarks.routing.trace import Conversation, TraceShape, make_trace
from kiln_common.bus.connect import connect_async
from kiln_common.bus.private_server import PrivateRedis
from kiln_common.clients.engine import EngineClient
from kiln_common.pb import engine_pb2
from kiln_engine.bootstrap import RunningEngine, start_engine
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings
from kiln_gateway.engine_discovery import discovering
from kiln_gateway.engine_pool import EnginePool

LEAST_OF_ONE_ENGINES_HITS = 0.9
MOST_IMBALANCE = 1.25
COLUMNS = ("commit", "gpu", "torch", "triton", "workload", "settings", "hit_rate", "imbalance",
           "computed_imbalance", "wall_s", "num_samples", "note")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the engines did with a trace; counts by engine."""

    num_prompt_tokens: int
    num_cached_tokens: int
    requests: list[int]
    computed_tokens: list[int]
    wall_s: float

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / self.num_prompt_tokens


def imbalance(counts: list[int]) -> float:
    """The largest over the mean."""
    return max(counts) * len(counts) / sum(counts)


class CountingClient(EngineClient):
    """A client that writes down to which engine each request went."""

    requests: ClassVar[Counter[str]] = Counter()

    async def generate(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]:
        self.requests[self.address] += 1
        async with contextlib.aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                yield output


@contextlib.asynccontextmanager
async def running(
    num_engines: int, num_gateways: int, folder: Path
) -> AsyncIterator[tuple[list[RunningEngine], list[EnginePool]]]:
    """Engines that announce themselves, and the pools of gateways that have found them all."""
    redis = PrivateRedis(folder / "redis", max_memory_mb=64)
    await asyncio.to_thread(redis.start)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(redis.close)
        engines = [await _start_engine(folder, number, redis.url) for number in range(num_engines)]
        for engine in engines:
            stack.push_async_callback(engine.stop)
        pools = [EnginePool([], CountingClient) for _ in range(num_gateways)]
        for pool in pools:
            client = connect_async(redis.url)
            stack.push_async_callback(client.aclose)
            stack.push_async_callback(pool.close)
            await stack.enter_async_context(discovering(client, pool))
        while any(len(pool.seats) < num_engines for pool in pools):
            await asyncio.sleep(0.05)
        yield engines, pools


async def _start_engine(folder: Path, number: int, redis_url: str) -> RunningEngine:
    parts = make_parts(parse_options(["--listen", "", "--vocab-size", str(TraceShape.vocab_size)]))
    limits = SchedulerLimits(
        num_pages=16_384, num_state_slots=2048, max_model_len=8192, max_running=64, step_token_budget=8192
    )
    settings = EngineSettings(
        model_path="none",
        listen=f"unix:{folder}/engine-{number}.sock",
        redis_url=redis_url,
        drain_timeout_s=0,
        run_ahead=1,
    )
    return await start_engine(settings, replace(parts, limits=limits))


async def play(
    trace: list[Conversation], pools: list[EnginePool], shape: TraceShape, *, num_clients: int, think_s: float
) -> None:
    """Every turn in the trace's order, once the turn before it has been answered and thought about."""
    gateways = itertools.cycle(pools)
    turns = iter(trace)
    may_go_on_s: dict[str, float] = {}
    idle = {talk.name: asyncio.Lock() for talk in trace}

    async def client() -> None:
        for talk in turns:
            async with idle[talk.name]:
                await asyncio.sleep(may_go_on_s.get(talk.name, 0.0) - time.monotonic())
                answer: list[int] = []
                async for output in next(gateways).generate(talk.next_request(shape)):
                    answer += output.token_ids
                assert len(answer) == shape.answer_tokens
                talk.take_answer(answer, shape)
                may_go_on_s[talk.name] = time.monotonic() + think_s

    await asyncio.gather(*(client() for _ in range(num_clients)))


async def measure(
    num_engines: int, num_gateways: int, shape: TraceShape, *, num_clients: int, think_s: float, seed: int
) -> Outcome:
    """Play a new trace to new engines."""
    with tempfile.TemporaryDirectory(prefix="kiln-routing-") as folder:
        async with running(num_engines, num_gateways, Path(folder)) as (engines, pools):
            CountingClient.requests.clear()
            started_s = time.monotonic()
            await play(make_trace(shape, seed), pools, shape, num_clients=num_clients, think_s=think_s)
            wall_s = time.monotonic() - started_s
            stats = [engine.loop.stats for engine in engines]
            return Outcome(
                sum(engine.num_prompt_tokens for engine in stats),
                sum(engine.num_cached_tokens for engine in stats),
                [CountingClient.requests[engine.server.address] for engine in engines],
                [engine.num_prompt_tokens - engine.num_cached_tokens for engine in stats],
                wall_s,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--think-s", type=float, default=1.5, help="between an answer and the next turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = TraceShape()
    results = ResultFile("routing", "cpu", COLUMNS)
    hits_of_one, has_missed = 0.0, False
    for num_engines, num_gateways in ((1, 1), (options.engines, 1), (options.engines, 3)):
        outcome = asyncio.run(
            measure(
                num_engines,
                num_gateways,
                shape,
                num_clients=options.clients,
                think_s=options.think_s,
                seed=options.seed,
            )
        )
        hits_of_one = hits_of_one or outcome.hit_rate
        share, most = outcome.hit_rate / hits_of_one, imbalance(outcome.requests)
        has_missed |= share < LEAST_OF_ONE_ENGINES_HITS or most > MOST_IMBALANCE
        results.add(
            f"{num_engines} engine(s), {num_gateways} gateway(s)",
            f"{shape.num_conversations} x {shape.num_turns} turns, {shape.start_tokens} + {shape.turn_tokens}"
            f" tokens, {shape.num_single} single, {options.clients} clients",
            hit_rate=f"{outcome.hit_rate:.4f}",
            imbalance=f"{most:.3f}",
            computed_imbalance=f"{imbalance(outcome.computed_tokens):.3f}",
            wall_s=f"{outcome.wall_s:.1f}",
            num_samples=sum(outcome.requests),
            note=f"{share:.1%} of one engine's hit rate; requests by engine {sorted(outcome.requests)}",
        )
    return int(has_missed)


if __name__ == "__main__":
    sys.exit(main())
