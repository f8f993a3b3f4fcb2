"""Load generator for OpenAI-compatible completion servers.

Sends streaming `POST {base_url}/completions` requests with random token-id prompts from a fixed
number of concurrent clients (a closed loop: every client sends its next request as soon as its last
one ends), and reports time to first token, inter-token latency, throughput and errors. It needs
nothing but the standard library.

    python -m benchmarks.http.openai_load --base-url http://127.0.0.1:8420/v1 --model m \\
        --concurrency 64 --requests 256 --prompt-tokens 1024 --max-tokens 256

the same over two gateways and from two processes, half of every prompt shared by all requests,
spread over two adapters, result as one JSON object:

    python -m benchmarks.http.openai_load --base-url http://127.0.0.1:8420/v1 http://127.0.0.1:8421/v1 \\
        --processes 2 --model m --concurrency 64 --requests 256 --prompt-tokens 1024 --max-tokens 256 \\
        --shared-prefix-tokens 512 --adapters ad0,ad1 --json

What the figures mean

ttft         Seconds from sending a request to the arrival of its first token. With more clients than
             the server runs at once this includes the time spent in the server's queue.
itl          Gaps between the arrivals of successive streamed events of one request, over all requests.
             It is the inter-token latency when the server sends one event a token; a server that
             packs several tokens into one shows fewer, longer gaps (tokens_per_event above 1 tells).
tpot         For each request, (last arrival - first arrival) / (output tokens - 1): the mean time a
             token takes, whatever the packing.
output_tok_s Output tokens of all successful requests over the time from the first request sent to
             the last response finished. It includes prefill and the ramp down at the end of the run.

Events are stored as they arrive and decoded after the run, so that the client stays cheap while it is
timing. client_cpu_share near the number of processes means that the client, not the server, was the
limit: use more processes.

Prompts are drawn from --seed: the same options give the same prompts. Use another seed for each run
against a server that caches prefixes. The exit status is 1 if any request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.http.load_report import Outcome, decode, print_table, report
from benchmarks.http.sse_client import Client, run_clients

# Seconds in which every client process has come up, before the first request is sent.
_PROCESS_START_S = 1.0


@dataclass(frozen=True)
class Share:
    """What one client process does."""

    base_urls: tuple[str, ...]
    bodies: tuple[bytes, ...]
    num_clients: int
    first_client: int
    api_key: str
    timeout_s: float
    start_s: float


def run_share(share: Share) -> tuple[list[Outcome], float]:
    """Send one process's part of the load; its outcomes and the processor seconds it took."""
    headers = [("Authorization", f"Bearer {share.api_key}")] if share.api_key else []
    clients = [
        Client(share.base_urls[(share.first_client + index) % len(share.base_urls)], headers, share.timeout_s)
        for index in range(share.num_clients)
    ]
    time.sleep(max(0.0, share.start_s - time.perf_counter()))
    started_s = time.process_time()
    answers = asyncio.run(run_clients(clients, share.bodies))
    cpu_s = time.process_time() - started_s
    return [decode(answer) for answer in answers], cpu_s


def run_load(options: argparse.Namespace, bodies: Sequence[bytes]) -> tuple[list[Outcome], float]:
    """Send all bodies from as many processes as asked for."""
    num_processes = min(options.processes, options.concurrency)
    start_s = time.perf_counter() + (_PROCESS_START_S if num_processes > 1 else 0.0)
    edges = [options.concurrency * number // num_processes for number in range(num_processes + 1)]
    shares = [
        Share(
            base_urls=tuple(options.base_url),
            bodies=tuple(bodies[number::num_processes]),
            num_clients=edges[number + 1] - edges[number],
            first_client=edges[number],
            api_key=options.api_key,
            timeout_s=options.timeout,
            start_s=start_s,
        )
        for number in range(num_processes)
    ]
    if num_processes == 1:
        return run_share(shares[0])
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(run_share, shares))
    return [outcome for outcomes, _ in parts for outcome in outcomes], sum(cpu_s for _, cpu_s in parts)


def make_bodies(options: argparse.Namespace, count: int, seed: str) -> list[bytes]:
    """JSON request bodies, all prepared before the clock starts."""
    low, high = options.vocab_low, options.vocab_high

    def draw(source: random.Random, num_tokens: int) -> list[int]:
        return [source.randrange(low, high) for _ in range(num_tokens)]

    # The prefix depends on --seed alone: warm-up and measured requests share it.
    prefix = draw(random.Random(f"{options.seed}/prefix"), options.shared_prefix_tokens)
    source = random.Random(f"{seed}/suffix")
    models = options.adapters or [options.model]
    bodies = []
    for index in range(count):
        body: dict[str, Any] = {
            "model": models[index % len(models)],
            "prompt": prefix + draw(source, options.prompt_tokens - len(prefix)),
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not options.stop_at_eos:
            body["ignore_eos"] = True
        bodies.append(json.dumps(body | options.extra_body).encode())
    return bodies


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", nargs="+", default=["http://127.0.0.1:8420/v1"], help="API roots; clients take turns")
    add("--model", required=True, help="model name to send")
    add("--concurrency", type=int, default=64, help="clients that run at the same time")
    add("--processes", type=int, default=1, help="processes that the clients are dealt over")
    add("--requests", type=int, default=256, help="measured requests in all")
    add("--warmup", type=int, default=0, help="requests sent first, same shape, not measured")
    add("--prompt-tokens", type=int, default=1024, help="prompt length, shared prefix included")
    add("--max-tokens", type=int, default=256, help="output tokens to ask for")
    add("--shared-prefix-tokens", type=int, default=0, help="leading prompt tokens that all requests share")
    add("--adapters", default="", help="comma-separated model names used in turn in place of --model")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="seed of the prompts")
    add("--vocab-low", type=int, default=1000, help="lowest token id in prompts")
    add("--vocab-high", type=int, default=100_000, help="token ids in prompts stay below this")
    add("--stop-at-eos", action="store_true", help="let the model stop early (else ignore_eos is sent)")
    add("--extra-body", default="{}", help="JSON object merged into every request body")
    add("--api-key", default="", help="sent as a bearer token")
    add("--timeout", type=float, default=600.0, help="seconds allowed for one request")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.shared_prefix_tokens > options.prompt_tokens:
        parser.error("--shared-prefix-tokens is larger than --prompt-tokens")
    if min(options.concurrency, options.requests, options.prompt_tokens, options.processes) < 1:
        parser.error("--concurrency, --processes, --requests and --prompt-tokens must be positive")
    if not 0 <= options.vocab_low < options.vocab_high:
        parser.error("--vocab-low must be below --vocab-high")
    try:
        options.extra_body = json.loads(options.extra_body)
    except ValueError as error:
        parser.error(f"--extra-body: {error}")
    if not isinstance(options.extra_body, dict):
        parser.error("--extra-body must be a JSON object")
    options.adapters = [name.strip() for name in options.adapters.split(",") if name.strip()]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, send the load and sum up."""
    if options.warmup:
        run_load(options, make_bodies(options, options.warmup, f"{options.seed}/warmup"))
    outcomes, cpu_s = run_load(options, make_bodies(options, options.requests, f"{options.seed}/run"))
    figures = report(
        outcomes, prompt_tokens=options.prompt_tokens, max_tokens=options.max_tokens, cpu_s=cpu_s
    )
    given = {name: value for name, value in vars(options).items() if name not in ("api_key", "json")}
    return {"options": given, **figures}


def main() -> None:
    options = parse_options()
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
    else:
        print_table(figures)
    sys.exit(bool(figures["failed"]))


if __name__ == "__main__":
    main()
