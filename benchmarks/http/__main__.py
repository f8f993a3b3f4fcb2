"""Measures serving over HTTP: `python -m benchmarks.http --model FOLDER --gateways 1 4`.

First the engine by itself with the same workload, in a process of its own; then `kiln up` on the
model, and for each count that many gateways with the load dealt over them. What counts is the share
of the engine's own rate that arrives. Rows go to benchmarks/results/http.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine.results import RESULTS, ResultFile, device_name
from benchmarks.engine.workloads import TABLE, TINY, Sizes
from benchmarks.http import openai_load
from benchmarks.http.gateways import more_gateways
from tests.support.stack import Stack


def engine_rate(model: Path, is_tiny: bool, repeats: int) -> float:
    """Output tokens a second of the same closed loop without HTTP."""
    command = [sys.executable, "-m", "benchmarks.engine", "--model", str(model), "--parts", "clients"]
    command += ["--tiny"] * is_tiny + ["--repeats", str(repeats)]
    subprocess.run(command, check=True)
    path = Path(os.environ.get("KILN_BENCH_RESULTS", RESULTS)) / "engine.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if " clients, " in row["workload"]]
    return float(rows[-1]["tok_per_s"])


class HttpLoad:
    """The workload, sent to some base URLs over and over with fresh prompts."""

    def __init__(self, model_id: str, sizes: Sizes, vocab_size: int) -> None:
        self._sizes = sizes
        self._fixed = ["--model", model_id, "--vocab-low", "0", "--vocab-high", str(vocab_size)]
        self._fixed += ["--concurrency", str(sizes.num_clients), "--temperature", "1", "--json"]
        self._fixed += ["--prompt-tokens", str(sizes.wave_prompt)]
        self._seed = 0

    def run(self, base_urls: list[str], count: int, max_tokens: int, num_processes: int) -> dict[str, Any]:
        self._seed += 1
        options = [*self._fixed, "--requests", str(count), "--max-tokens", str(max_tokens)]
        options += ["--processes", str(num_processes), "--seed", str(self._seed)]
        figures = openai_load.measure(openai_load.parse_options([*options, "--base-url", *base_urls]))
        if figures["failed"]:
            raise SystemExit(f"{figures['failed']} requests failed: {figures['errors']}")
        return figures


def main() -> None:
    options = _options()
    sizes = TINY if options.tiny else TABLE
    repeats = options.repeats or sizes.repeats
    own_rate = options.engine_rate or engine_rate(options.model, options.tiny, repeats)
    results = ResultFile("http", device_name())
    with tempfile.TemporaryDirectory(prefix="kiln-http-") as folder:
        stack = Stack(Path(folder) / "s", "--model", str(options.model))
        try:
            stack.start(timeout_s=240.0)
            model_id = stack.get("/v1/models")["data"][0]["id"]
            load = HttpLoad(model_id, sizes, options.vocab_size)
            with more_gateways(stack, options.model, max(options.gateways) - 1) as more:
                urls = [f"{url}/v1" for url in (stack.url, *more)]
                load.run(urls, sizes.num_clients, min(16, sizes.wave_output), 1)  # warms up
                for count in options.gateways:
                    runs = [
                        load.run(urls[:count], sizes.client_requests, sizes.wave_output, options.processes)
                        for _ in range(repeats)
                    ]
                    _add_row(results, sizes, count, runs, own_rate)
        finally:
            stack.stop()
            _print_tail(stack.state_dir / "logs")


def _add_row(
    results: ResultFile, sizes: Sizes, num_gateways: int, runs: list[dict[str, Any]], own_rate: float
) -> None:
    rate = statistics.median(run["output_tok_s"] for run in runs)
    first = runs[-1]["ttft_s"]
    results.add(
        f"{num_gateways} gateway(s), {sizes.num_clients} clients, {sizes.client_requests} requests,"
        f" {sizes.wave_prompt} -> {sizes.wave_output}",
        "defaults",
        p50_ms=1e3 * first["p50"],
        p90_ms=1e3 * first["p90"],
        p99_ms=1e3 * first["p99"],
        mean_ms=1e3 * first["mean"],
        tok_per_s=rate,
        num_samples=len(runs),
        note=f"times are to the first token; {100 * rate / own_rate:.1f} % of the engine's own"
        f" {own_rate:.0f} tok/s; TPOT {1e3 * runs[-1]['tpot_s']['p50']:.2f} ms;"
        f" {runs[-1]['tokens_per_event']:.2f} tokens an event; client {runs[-1]['client_cpu_share']:.2f} cores",
    )


def _print_tail(logs: Path) -> None:
    """Errors that the services logged while they were measured."""
    for path in sorted(logs.glob("*.log")):
        errors = [line for line in path.read_text(errors="replace").splitlines() if '"error"' in line]
        for line in errors[-5:]:
            print(f"{path.name}: {line[:500]}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--gateways", nargs="+", type=int, default=[1, 4], help="counts, one row each")
    parser.add_argument("--processes", type=int, default=2, help="client processes")
    parser.add_argument("--repeats", type=int, default=0, help="0: three, or one when tiny")
    parser.add_argument("--engine-rate", type=float, default=0.0, help="tok/s of the engine if known already")
    parser.add_argument("--vocab-size", type=int, default=2000, help="token ids in prompts stay below this")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
