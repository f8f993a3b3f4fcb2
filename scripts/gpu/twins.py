"""Correctness twins of the speed figures: the engine against transformers on the same random weights.

    python scripts/gpu/twins.py --model /tmp/random-4b [--variants defaults kv_dtype=fp8] [--tiny]

Each variant of the engine's settings answers in a process of its own (twins_engine.py), through
scheduler, loop and runner as they serve; transformers then scores the very tokens that were drawn,
in float32 and in bfloat16 (twins_reference.py). The exit status is 1 when the first variant misses
an aim, or one with batch_invariant=true does not answer alone as in a batch; otherwise the other
variants are reported beside it. Rows go to benchmarks/results/twins.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engine.results import RESULTS, commit, device_name

HERE = Path(__file__).resolve().parent
LEAST_AGREEMENT = 0.99
# A lead of this many times the rms error of transformers' own bfloat16 cannot be noise.
_CLEAR_MARGIN = 4.0
# How much worse than an intact one an answer from a spoilt checkpoint must score.
LEAST_SPOILT_RATIO = 3.0


@dataclass(frozen=True)
class Token:
    """One drawn token as engine and reference see it."""

    engine_error: float  # log-probability, engine minus float32
    own_error: float  # transformers' bfloat16 minus float32
    margin: float
    # Whether the most likely token is the reference's; the engine's is known where it drew greedily.
    engine_agrees: bool | None
    own_agrees: bool


def tokens_of(trace: dict[str, Any], exact: dict[str, Any], own: dict[str, Any]) -> list[Token]:
    """A trace's tokens beside the scores of float32 and of transformers' bfloat16."""
    return [
        Token(
            engine_error=logprob - exact["logprobs"][i],
            own_error=own["logprobs"][i] - exact["logprobs"][i],
            margin=exact["margins"][i],
            engine_agrees=token == exact["top_ids"][i] if trace["is_greedy"] else None,
            own_agrees=own["top_ids"][i] == exact["top_ids"][i],
        )
        for i, (token, logprob) in enumerate(zip(trace["tokens"], trace["logprobs"], strict=True))
    ]


def mean_error(tokens: Sequence[Token]) -> float:
    """Mean |Δ log-probability| of the engine; infinite if one is not finite."""
    if not tokens:
        return math.nan
    error = statistics.fmean(abs(token.engine_error) for token in tokens)
    return error if math.isfinite(error) else math.inf


def summarise(tokens_by_group: dict[str, list[list[Token]]]) -> dict[str, float]:
    """The comparison's figures from the tokens of each trace, by group."""
    scored = [token for trace in tokens_by_group.get("batch", []) for token in trace]
    noise = math.sqrt(statistics.fmean(token.own_error**2 for token in scored))
    clear = [token for token in scored if token.margin > _CLEAR_MARGIN * noise]
    greedy = [token for token in clear if token.engine_agrees is not None]
    figures = {
        "mean_abs_error": mean_error(scored),
        "own_mean_abs_error": statistics.fmean(abs(token.own_error) for token in scored),
        "own_rms_error": noise,
        "clear_share": len(clear) / len(scored),
        "agreement": _share([bool(token.engine_agrees) for token in greedy]),
        "own_agreement": _share([token.own_agrees for token in clear]),
        "agreement_unfiltered": _share(
            [token.engine_agrees for token in scored if token.engine_agrees is not None]
        ),
        "num_scored": len(scored),
    }
    for group, traces in tokens_by_group.items():
        if group not in ("batch", "long"):
            figures[f"{group}_mean_abs_error"] = mean_error([token for trace in traces for token in trace])
    for trace in tokens_by_group.get("long", []):
        quarter = max(1, len(trace) // 4)
        figures["long_first_quarter_error"] = mean_error(trace[:quarter])
        figures["long_last_quarter_error"] = mean_error(trace[-quarter:])
    return figures


def _share(values: Sequence[bool]) -> float:
    return statistics.fmean(values) if values else math.nan


def shortfalls(figures: dict[str, float], facts: dict[str, Any], noise_floor: float = 1e-4) -> list[str]:
    """What misses its aim, in words. Errors below `noise_floor` are float32's own."""
    found = []
    if not figures["agreement"] >= LEAST_AGREEMENT:
        found.append(f"top-1 agreement {figures['agreement']:.4f} is below {LEAST_AGREEMENT}")
    if not figures["mean_abs_error"] <= max(figures["own_mean_abs_error"], noise_floor):
        found.append(
            f"mean |Δ log-probability| {figures['mean_abs_error']:.2e} is above transformers' own"
            f" {figures['own_mean_abs_error']:.2e}"
        )
    for spoilt in ("wiped", "swapped"):
        key = f"{spoilt}_mean_abs_error"
        intact = max(figures.get("intact_mean_abs_error", math.nan), noise_floor)
        if key in figures and not figures[key] >= LEAST_SPOILT_RATIO * intact:
            found.append(f"a {spoilt} checkpoint went unnoticed ({figures[key]:.2e})")
    late, early = figures.get("long_last_quarter_error"), figures.get("long_first_quarter_error", math.nan)
    if late is not None and not late <= 1.5 * max(early, noise_floor):
        found.append(f"a long answer drifts: {early:.2e} in its first quarter, {late:.2e} in its last")
    for name in ("leaked_pages", "leaked_state_slots", "num_running_after", "num_not_finite"):
        if facts.get(name):
            found.append(f"{name} is {facts[name]}")
    return found + broken_promises(facts)


def broken_promises(facts: dict[str, Any]) -> list[str]:
    """What misses an aim that a variant's own settings set, whichever variant it is."""
    share = facts.get("alone_identical_share", math.nan)
    if facts.get("is_batch_invariant") and share != 1:
        firsts = facts.get("alone_first_differences")
        return [f"batch-invariant, yet {share:.3f} of the answers alone are those of the batch ({firsts})"]
    return []


def run_variant(model: Path, variant: str, out: Path, flags: Sequence[str]) -> bool:
    """Run one engine; False when this engine does not know the variant's settings."""
    command = [
        sys.executable,
        str(HERE / "twins_engine.py"),
        "--model",
        str(model),
        "--out",
        str(out),
        *flags,
    ]
    if variant != "defaults":
        command += ["--set", *variant.split(",")]
    subprocess.run(command, check=True)
    return out.exists()


def compare(scored: dict[str, Any]) -> list[tuple[str, dict[str, float], dict[str, Any]]]:
    """(settings, figures, facts) of each report in what the reference wrote."""
    results, first = [], 0
    for report in scored["reports"]:
        groups: dict[str, list[list[Token]]] = {}
        for number, trace in enumerate(report["traces"], first):
            exact, own = scored["scores"]["float32"][number], scored["scores"]["bfloat16"][number]
            groups.setdefault(trace["group"], []).append(tokens_of(trace, exact, own))
        first += len(report["traces"])
        results.append((report["settings"], summarise(groups), report["facts"]))
    return results


def write_rows(settings: str, figures: dict[str, Any]) -> None:
    """Print the figures and append them to the results, one row each."""
    folder = Path(os.environ.get("KILN_BENCH_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "twins.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(("commit", "gpu", "settings", "figure", "value"))
        for name, value in figures.items():
            shown = f"{value:.5g}" if isinstance(value, float) else str(value)
            print(f"  {name:32s} {shown}")
            writer.writerow((commit(), device_name(), settings, name, shown))


def main() -> None:
    options = _options()
    flags = ["--tiny"] * options.tiny
    with tempfile.TemporaryDirectory(prefix="kiln-twins-") as folder:
        traces = []
        for number, variant in enumerate(options.variants):
            path = Path(folder) / f"{number}.json"
            if run_variant(options.model, variant, path, flags + ["--short"] * (number > 0 or options.short)):
                traces.append(str(path))
        out = Path(folder) / "scores.json"
        command = [sys.executable, str(HERE / "twins_reference.py"), "--model", str(options.model)]
        subprocess.run([*command, "--traces", *traces, "--out", str(out)], check=True)
        results = compare(json.loads(out.read_text()))
    missed: list[str] = []
    for number, (settings, figures, facts) in enumerate(results):
        print(f"{settings}:")
        write_rows(settings, {**figures, **facts})
        for line in (found := shortfalls(figures, facts)):
            print(f"  MISSED: {line}")
        missed += found if number == 0 else broken_promises(facts)
    sys.exit(bool(missed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["defaults"],
        help="settings to compare, NAME=VALUE[,NAME=VALUE]; the first one runs everything",
    )
    parser.add_argument("--short", action="store_true", help="without spoilt checkpoints and the long answer")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
