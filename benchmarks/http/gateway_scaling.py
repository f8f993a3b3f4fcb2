"""What more gateways bring: `python -m benchmarks.http.gateway_scaling`, on a host with 12 cores or more.

The same load goes to one gateway and to three before engines without a model (paced_engine.py) that
are faster than the gateways. With 12 cores each gateway has one of its own, whose other hardware thread
stays idle, each engine a thread, and the load generator all others (taskset); with fewer nothing is
pinned, and the ratio says little. Prints the ratio; exit status 1 when it is below 2.7 although
everything was pinned. Rows go to benchmarks/results/http.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.engine.results import ResultFile
from benchmarks.http import openai_load
from benchmarks.http.gateway_cost import cpu_seconds
from benchmarks.http.gateways import running_gateways

_DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
_LEAST_RATIO = 2.7
_NUM_GATEWAYS = (1, 3)
_LEAST_CORES = 12


def whole_cores(cpus: list[int]) -> list[list[int]]:
    """The hardware threads of each core; neighbours where Linux knows of none, as in some virtual machines."""
    groups: dict[str, list[int]] = {}
    for cpu in cpus:
        told = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        groups.setdefault(told.read_text() if told.exists() else str(cpu), []).append(cpu)
    if len(groups) < len(cpus):
        return list(groups.values())
    return [cpus[start : start + 2] for start in range(0, len(cpus), 2)]


def pinned(cores: list[int], count: int) -> list[list[str]]:
    """A taskset prefix for each of `count` processes, a core of the list for each; none without cores."""
    return [["taskset", "-c", str(core)] for core in cores[:count]] or [[]] * count


@contextlib.contextmanager
def running_engines(folder: Path, prefixes: list[list[str]], options: argparse.Namespace) -> Iterator[str]:
    """Paced engines; yields their addresses, comma separated."""
    engines, addresses = [], []
    try:
        for number, prefix in enumerate(prefixes):
            addresses.append(f"unix:{folder}/engine-{number}.sock")
            command = [*prefix, sys.executable, "-m", "benchmarks.http.paced_engine"]
            command += ["--listen", addresses[-1], "--step-ms", str(options.step_ms)]
            command += ["--row-us", str(options.row_us), "--prompt-token-us", "0"]
            command += ["--most-running", str(options.clients)]
            engines.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        yield ",".join(addresses)
    finally:
        for engine in engines:
            engine.terminate()
        for engine in engines:
            engine.wait(10)


def measure(num_gateways: int, options: argparse.Namespace, cores: list[list[int]]) -> dict[str, float]:
    """Tokens a second through so many gateways, and the share of a core that each of them used."""
    most = max(_NUM_GATEWAYS)
    others = [thread for threads in cores[most:] for thread in threads]
    gateway_prefixes = pinned([threads[0] for threads in cores[:most]], num_gateways)
    engine_prefixes = pinned(others, options.engines)
    if cores:
        os.sched_setaffinity(0, others[options.engines :])
    with (
        tempfile.TemporaryDirectory(prefix="kiln-scaling-") as folder,
        running_engines(Path(folder), engine_prefixes, options) as addresses,
    ):
        environment = {
            "KILN_GATEWAY_MODEL_PATH": str(_DEMO_MODEL),
            "KILN_GATEWAY_ENGINE_ADDRESSES": addresses,
            "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{folder}/none.sock",
            "KILN_GATEWAY_TRAINER_ADDRESSES": f"unix:{folder}/none.sock",
        }
        environments = [environment] * num_gateways
        with running_gateways(environments, Path(folder), gateway_prefixes) as gateways:
            load = ["--base-url", *(f"{url}/v1" for url, _ in gateways), "--model", "base"]
            load += ["--concurrency", str(options.clients), "--processes", str(options.processes)]
            load += [
                "--prompt-tokens",
                "128",
                "--max-tokens",
                str(options.max_tokens),
                "--vocab-high",
                "2500",
            ]
            load += ["--requests", str(options.requests), "--warmup", str(options.clients)]
            before = sum(cpu_seconds(pid) for _, pid in gateways)
            figures = openai_load.measure(openai_load.parse_options(load))
            spent_s = sum(cpu_seconds(pid) for _, pid in gateways) - before
    if figures["failed"]:
        raise SystemExit(f"{figures['failed']} requests failed: {figures['errors']}")
    return {
        "tok_per_s": figures["output_tok_s"],
        "client_cpu_share": figures["client_cpu_share"],
        "gateway_cpu_s": spent_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--clients", type=int, default=192)
    parser.add_argument("--requests", type=int, default=1152)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--processes", type=int, default=0, help="of clients; 0: one for each core left")
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--row-us", type=float, default=5.0)
    options = parser.parse_args()
    everything = sorted(os.sched_getaffinity(0))
    cores = whole_cores(everything) if len(everything) >= _LEAST_CORES else []
    num_taken = sum(map(len, cores[: max(_NUM_GATEWAYS)])) + options.engines
    options.processes = options.processes or max(1, len(everything) - num_taken)
    results = ResultFile("http", "cpu")
    rates = []
    for num_gateways in _NUM_GATEWAYS:
        figures = measure(num_gateways, options, cores)
        os.sched_setaffinity(0, everything)
        rates.append(figures["tok_per_s"])
        results.add(
            f"{num_gateways} gateway(s) before {options.engines} paced engines, {options.clients} clients",
            f"128 -> {options.max_tokens}, {'pinned' if cores else 'not pinned'},"
            f" {len(everything)} processors",
            tok_per_s=figures["tok_per_s"],
            num_samples=options.requests,
            note=f"gateways' processor time {figures['gateway_cpu_s']:.1f} s, warm-up included;"
            f" clients' share of a core {figures['client_cpu_share']:.2f} in {options.processes} process(es)",
        )
    ratio = rates[-1] / rates[0]
    print(f"{_NUM_GATEWAYS[-1]} gateways carry {ratio:.2f} times what one carries")
    return int(bool(cores) and ratio < _LEAST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
