"""The demo task's reward over several seeds, each with its control whose rewards are shuffled.

`python -m benchmarks.reward_seeds` runs `kiln demo` once a seed and prints a table; its exit code
is 1 unless every adapter rose above the base model and every control stayed at it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

_LINE = "| {seed} | {before} | {after} | {control} | {rounds} | {failed} of {total} |"


def run_demo(seed: int, rounds: int) -> dict[str, Any]:
    """What the demonstration's last line says. Raises CalledProcessError if it did not get there."""
    command = [sys.executable, "-m", "kiln_cli", "demo", "--seed", str(seed), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.rstrip().endswith("}"):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def has_learned(result: dict[str, Any]) -> bool:
    """Whether the adapter's interval lies above the base model's, and the control moved less than half as far."""
    before, after, control = (result[key] for key in ("reward_before", "reward_after", "control_after"))
    gain = after["mean"] - before["mean"]
    return after["low"] > before["high"] and control["mean"] - before["mean"] < gain / 2


def row(seed: int, result: dict[str, Any]) -> str:
    """A line of the table: means with their 95 % intervals."""
    shown = {
        key: f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
        for key, interval in (
            ("before", result["reward_before"]),
            ("after", result["reward_after"]),
            ("control", result["control_after"]),
        )
    }
    counts = {"failed": result["requests_failed"], "total": result["requests_total"]}
    return _LINE.format(seed=seed, rounds=result["rounds"], **shown, **counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=16)
    options = parser.parse_args()
    results = {}
    print("| seed | base model | adapter | control, rewards shuffled | rounds | requests failed |")
    print("|---|---|---|---|---|---|")
    for seed in options.seeds:
        results[seed] = run_demo(seed, options.rounds)
        print(row(seed, results[seed]), flush=True)
    return 0 if all(map(has_learned, results.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
