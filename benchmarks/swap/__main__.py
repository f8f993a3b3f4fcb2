"""How fast a new version answers: `python -m benchmarks.swap --model FOLDER --swaps 1000`.

Starts `kiln up` on the model (the demo model without --model) and measures

- swaps of ready-made versions under load, each of which says a token of its own (--swaps, --rank;
  --whole for files of an ordinary adapter's size): publish, commit to serving, first token;
- rollbacks of such versions under load (--rollbacks): the call, and from it to the next request's first token;
- GRPO jobs by completion id (--jobs), from the POST to the first token of the new version.

Ends with status 1 when a request failed or a token was not of the version its answer names. Rows go to
benchmarks/results/swap.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.engine.results import ResultFile, device_name
from benchmarks.percentiles import percentile
from benchmarks.swap.grpo import time_job
from benchmarks.swap.rollbacks import RollbackReport, run_rollbacks
from benchmarks.swap.swaps import StackAddresses, SwapReport, run_swaps
from benchmarks.swap.telling_adapters import TellingAdapters
from tests.support.stack import Stack

# The first start on a kind of GPU compiles.
_START_TIMEOUT_S = 400.0
DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"


def add_times(
    results: ResultFile, workload: str, settings: str, times_s: list[float], note: str = ""
) -> None:
    ordered = sorted(1e3 * time_s for time_s in times_s)
    results.add(
        workload,
        settings,
        p50_ms=percentile(ordered, 0.5),
        p90_ms=percentile(ordered, 0.9),
        p99_ms=percentile(ordered, 0.99),
        mean_ms=sum(ordered) / len(ordered),
        num_samples=len(ordered),
        note=f"longest {ordered[-1]:.1f} ms{note}",
    )


def report_swaps(results: ResultFile, report: SwapReport, settings: str) -> bool:
    """Add the rows; whether every token was right and no request failed."""
    answers = report.answers
    add_times(results, "swap, publish to commit", settings, report.publish_s)
    add_times(
        results,
        "swap, commit to serving",
        settings,
        report.swap_s,
        f"; {answers.num_requests} requests, {answers.num_tokens} tokens of {len(answers.by_version)} versions,"
        f" {answers.num_mixed} answers of several; {len(answers.failures)} failed, {len(answers.wrong)} wrong",
    )
    add_times(results, "swap, commit to first token", settings, report.first_token_s)
    add_times(results, "first token without a swap", settings, report.ordinary_s)
    for line in [*answers.failures[:5], *answers.wrong[:5]]:
        print(line)
    return not answers.failures and not answers.wrong


def report_rollbacks(results: ResultFile, report: RollbackReport, settings: str) -> bool:
    """Add the rows; whether every token was right and no request failed."""
    answers = report.answers
    add_times(results, "rollback, the call", settings, report.call_s)
    add_times(
        results,
        "rollback, call to first token",
        settings,
        report.first_token_s,
        f"; {answers.num_requests} requests; {len(answers.failures)} failed, {len(answers.wrong)} wrong",
    )
    add_times(results, "first token without a rollback", settings, report.ordinary_s)
    for line in [*answers.failures[:5], *answers.wrong[:5]]:
        print(line)
    return not answers.failures and not answers.wrong


async def measure(options: argparse.Namespace, stack: Stack, folder: Path) -> bool:
    results = ResultFile("swap", device_name())
    is_right = True
    for number in range(options.jobs):
        seconds = await time_job(stack.url, "timed", num_rollouts=8, max_tokens=options.job_tokens)
        shown = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in seconds.items() if name != "queued")
        results.add(
            f"GRPO 8 x {options.job_tokens} by completion id, POST to first token",
            f"job {number + 1}",
            mean_ms=1e3 * seconds["first token"],
            num_samples=1,
            note=f"ms after the POST: {shown}",
        )
    adapters = TellingAdapters(folder, rank=options.rank, covers_all=options.whole)
    addresses = StackAddresses.of(stack.url, stack.state_dir)
    traffic = {"num_clients": options.clients, "max_tokens": options.max_tokens}
    settings = f"{adapters.num_bytes / 1e6:.1f} MB, {options.clients} clients"
    if options.swaps:
        swaps = await run_swaps(
            addresses, adapters, num_swaps=options.swaps, most_seconds=options.seconds, **traffic
        )
        is_right &= report_swaps(results, swaps, settings)
    if options.rollbacks:
        rollbacks = await run_rollbacks(addresses, adapters, num_rollbacks=options.rollbacks, **traffic)
        is_right &= report_rollbacks(results, rollbacks, settings)
    return is_right


def main() -> None:
    options = _options()
    folder = options.model or DEMO_MODEL
    arguments = ["--model", str(folder)] if options.model else []
    with tempfile.TemporaryDirectory() as state:
        stack = Stack(Path(state) / "s", *arguments)
        try:
            stack.start(_START_TIMEOUT_S)
            is_right = asyncio.run(measure(options, stack, folder))
        finally:
            stack.stop()
            if options.keep_logs:
                shutil.copytree(stack.state_dir / "logs", options.keep_logs)
    sys.exit(not is_right)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder; the demo model if left out")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=900.0, help="for all swaps; those not begun are left out"
    )
    parser.add_argument("--rollbacks", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--whole", action="store_true", help="adapters with every linear layer")
    parser.add_argument("--jobs", type=int, default=3, help="GRPO jobs; the first one warms up")
    parser.add_argument("--job-tokens", type=int, default=128)
    parser.add_argument("--keep-logs", type=Path, help="where the services' logs go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
