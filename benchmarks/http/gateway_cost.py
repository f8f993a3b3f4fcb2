"""What a gateway and the engine's own process spend on a token: `python -m benchmarks.http.gateway_cost`.

Gateways before a paced engine (no model, no GPU) stream to clients; the processor time of each process
over the tokens that arrived is its cost. A gateway is one thread: it carries at most one second over
that cost, however fast the engine is. Rows go to benchmarks/results/http.csv.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.engine.results import ResultFile
from benchmarks.http import openai_load
from benchmarks.http.gateways import running_gateways

_DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=2.4)
    parser.add_argument("--row-us", type=float, default=25.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kiln-cost-") as folder:
        address = f"unix:{folder}/engine.sock"
        command = [sys.executable, "-m", "benchmarks.http.paced_engine", "--listen", address]
        command += ["--step-ms", str(options.step_ms), "--row-us", str(options.row_us)]
        engine = subprocess.Popen(
            [*command, "--most-running", str(options.clients)], stdout=subprocess.DEVNULL
        )
        environment = {
            "KILN_GATEWAY_MODEL_PATH": str(_DEMO_MODEL),
            "KILN_GATEWAY_ENGINE_ADDRESSES": address,
            "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{folder}/none.sock",
            "KILN_GATEWAY_TRAINER_ADDRESSES": f"unix:{folder}/none.sock",
        }
        try:
            with running_gateways([environment] * options.gateways, Path(folder)) as gateways:
                _measure(options, gateways, engine.pid)
        finally:
            engine.terminate()
            engine.wait(10)


def _measure(options: argparse.Namespace, gateways: list[tuple[str, int]], engine_pid: int) -> None:
    urls = [f"{url}/v1" for url, _ in gateways]
    load = ["--base-url", *urls, "--model", "base", "--concurrency", str(options.clients)]
    load += ["--requests", str(options.requests), "--processes", str(options.processes)]
    load += ["--prompt-tokens", str(options.prompt_tokens), "--max-tokens", str(options.max_tokens)]
    load += ["--vocab-high", "2500", "--temperature", "1"]
    openai_load.measure(openai_load.parse_options([*load, "--requests", str(options.clients), "--seed", "9"]))
    pids = [pid for _, pid in gateways]
    before = [cpu_seconds(pid) for pid in (*pids, engine_pid)]
    figures = openai_load.measure(openai_load.parse_options(load))
    spent = [
        after - earlier for after, earlier in zip(map(cpu_seconds, (*pids, engine_pid)), before, strict=True)
    ]
    if figures["failed"]:
        raise SystemExit(f"{figures['failed']} requests failed: {figures['errors']}")
    tokens = figures["output_tokens"]
    gateway_us, engine_us = 1e6 * sum(spent[:-1]) / tokens, 1e6 * spent[-1] / tokens
    ResultFile("http", "cpu").add(
        f"{options.gateways} gateway(s), {options.clients} clients, paced engine,"
        f" {options.prompt_tokens} -> {options.max_tokens}",
        f"step {options.step_ms} ms + {options.row_us} us a row",
        tok_per_s=figures["output_tok_s"],
        num_samples=options.requests,
        note=f"gateway {gateway_us:.0f} us a token, so {1e6 / gateway_us:.0f} tok/s at most;"
        f" engine process {engine_us:.0f} us; client {1e6 * figures['client_cpu_share'] * figures['wall_s'] / tokens:.0f} us;"
        f" {figures['tokens_per_event']:.2f} tokens an event",
    )


if __name__ == "__main__":
    main()
