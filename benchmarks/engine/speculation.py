"""Decoding with drafts against decoding without: `python -m benchmarks.engine.speculation --model FOLDER`.

The acceptance is made up, because random weights guess nothing: every request must draw one token again
and again (by its logit bias), and its drafts are that token, or with the chance of a rejection another one.
They lie where the model's own drafts would, and the multi-token-prediction layer runs for its cost; so
does the policy that decides how far to guess. Each kind of speculation is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.recording import Recording
from benchmarks.engine.requests import random_prompt
from benchmarks.engine.results import ResultFile, device_name
from benchmarks.engine.spine import Spine, make_settings
from kiln_common.logs import configure_logs
from kiln_engine.domain import BatchPlan, GenerationRequest, SamplingParams, VerifyRow
from kiln_engine.execution.drafting import DraftPass

_TOKEN, _OTHER_TOKEN = 11, 12
_BIAS = 1e4
_PROMPT_TOKENS = 512
_TIMED_REPLAYS = 20


class MadeUpDrafts:
    """Stands before a runner's `launch` and puts drafts of known acceptance where the device's would be."""

    def __init__(self, launch: Callable[[BatchPlan], Any], acceptance: float) -> None:
        self._launch = launch
        self._acceptance = acceptance
        self._rng = random.Random(0)
        self.num_proposed = self.num_steps = 0
        # Of the step launched last.
        self.num_rows = self.num_lines = 0

    def launch(self, plan: BatchPlan) -> Any:
        self.num_steps += 1
        self.num_rows = len(plan.verify_rows)
        self.num_lines = max((row.num_lines for row in plan.verify_rows), default=0)
        return self._launch(replace(plan, verify_rows=tuple(map(self._with_drafts, plan.verify_rows))))

    def _with_drafts(self, row: VerifyRow) -> VerifyRow:
        self.num_proposed += row.num_drafts
        accepted = [self._rng.random() < self._acceptance for _ in range(row.num_drafts)]
        return replace(row, draft_token_ids=tuple(_TOKEN if yes else _OTHER_TOKEN for yes in accepted))


def make_requests(spine: Spine, batch: int, max_tokens: int, seed: int) -> list[GenerationRequest]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logit_bias={_TOKEN: _BIAS})
    vocab_size = spine.config.vocab_size
    return [
        GenerationRequest(f"{seed}-{i}", random_prompt(_PROMPT_TOKENS, vocab_size, (seed, i)), params)
        for i in range(batch)
    ]


def tokens_per_s(recording: Recording) -> float:
    """While every request decoded: after the last first token, before the first end."""
    first = max(i for i, (_, events) in enumerate(recording.arrivals) if any(e.is_first for e in events))
    last = min(i for i, (_, events) in enumerate(recording.arrivals) if any(e.finish_reason for e in events))
    window = recording.arrivals[first : last + 1]
    num_tokens = sum(len(events) for _, events in window[1:])
    return num_tokens / (window[-1][0] - window[0][0])


def measure(spine: Spine, batch: int, max_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """The median speed of a batch, and with `--parts` what its steps are made of.

    The first run warms up, and lets the policy measure.
    """
    repeats = options.repeats
    made_up = MadeUpDrafts(spine.runner.launch, options.acceptance)
    spine.runner.launch = made_up.launch
    try:
        speeds = []
        for repeat in range(repeats + 1):
            made_up.num_proposed = made_up.num_steps = 0
            requests = make_requests(spine, batch, max_tokens, 1000 * batch + repeat)
            speeds.append(tokens_per_s(spine.run(requests)))
        drafts_a_row = made_up.num_proposed / (made_up.num_steps * batch)
        parts = parts_ms(spine, batch, max_tokens, made_up) if options.parts else {}
    finally:
        del spine.runner.launch
    row = {"batch": batch, "tok_per_s": sorted(speeds[1:])[repeats // 2], "drafts": drafts_a_row}
    return row | {"parts_ms": parts, "costs_ms": learned_costs_ms(spine, batch)}


def learned_costs_ms(spine: Spine, batch: int) -> list[float]:
    """What the policy takes steps of 0, 1, ... drafts to cost; infinite where nothing like it was measured."""
    policy = spine.speculator and spine.speculator._policy
    seconds = policy._costs.seconds(batch, policy._costs.max_drafts) if policy else None
    return [1e3 * each for each in seconds or ()]


def parts_ms(spine: Spine, batch: int, max_tokens: int, made_up: MadeUpDrafts) -> dict[str, float]:
    """Milliseconds of the graphs that a speculative step replays, in the middle of one more run.

    They are timed between two steps of which the first was such a step: what they run over is still there.
    """
    graphs = spine.runner._graphs
    if graphs is None or not graphs.verify_sizes:
        return {}

    def timed() -> dict[str, float]:
        if made_up.num_rows != batch:
            return {}
        num_lines = min(n for n in graphs.verify_sizes if n >= made_up.num_lines)
        size = next((size for size in graphs.verify_sizes[num_lines] if size >= batch), None)
        if size is None:
            return {}
        step = graphs._verify[size, num_lines, False]._step
        parts = {f"verify of {num_lines} lines": step._forward.replay, "draw": step._draw.replay}
        if step.drafts is not None:
            parts["draft"] = partial(_first_draft, step.drafts)
        return {name: _timed_ms(part) for name, part in parts.items()}

    requests = make_requests(spine, batch, max_tokens, 1000 * batch - 1)
    found: dict[str, float] = {}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(spine.run, requests)
        while not found and not run.done():
            found = spine.between_steps(timed)
        run.result()
    return found


def _first_draft(drafts: DraftPass) -> None:
    """One draft, always that of the first place: there is no room for as many as are timed."""
    for number in (drafts.rows.column_R, drafts.rows.place_R):
        number.zero_()
    drafts.run_step()
    drafts.rows.positions_R.sub_(1)


@torch.inference_mode()
def _timed_ms(part: Callable[[], object]) -> float:
    part()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(_TIMED_REPLAYS):
        part()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started_s) / _TIMED_REPLAYS


def run_kind(options: argparse.Namespace) -> None:
    """Measure one kind of speculation; a JSON line for each batch."""
    configure_logs("bench", as_json=True)
    torch.set_grad_enabled(False)
    overrides = dict(pair.split("=", 1) for pair in options.set)
    fields: dict[str, Any] = {"max_running": max(options.batches)} | overrides
    if torch.cuda.is_available():
        fields.setdefault("gpu_memory_fraction", 0.85)
    settings = make_settings(
        options.model, speculation=options.kind, max_draft_tokens=options.drafts, **fields
    )
    with Spine(settings) as spine:
        for batch, max_tokens in zip(options.batches, options.tokens, strict=True):
            row = measure(spine, batch, max_tokens, options)
            print("ROW " + json.dumps(row), flush=True)


def run_process(kind: str, arguments: list[str]) -> dict[int, dict[str, Any]]:
    """The rows of one kind, by batch; each is printed when it comes.

    Raises:
        CalledProcessError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.engine.speculation", "--kind", kind, *arguments]
    rows: dict[int, dict[str, Any]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                rows[row["batch"]] = row
                print(f"{kind}, batch {row['batch']}: {row['tok_per_s']:.0f} tok/s", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return rows


def main() -> None:
    options = _options()
    if options.kind:
        run_kind(options)
        return
    plain = run_process("none", sys.argv[1:])
    guessed = run_process("mtp", sys.argv[1:])
    results = ResultFile("engine", device_name())
    for batch in options.batches:
        before, after = plain[batch]["tok_per_s"], guessed[batch]["tok_per_s"]
        parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in guessed[batch]["parts_ms"].items())
        costs = ", ".join(f"{ms:.2f}" for ms in guessed[batch]["costs_ms"])
        results.add(
            f"speculation, batch {batch}, acceptance {options.acceptance}, {options.drafts} drafts",
            ", ".join(options.set) or "defaults",
            tok_per_s=after,
            note=f"plain {before:.0f} tok/s, ratio {after / before:.3f}, {guessed[batch]['drafts']:.2f} drafts"
            f" a row and step; steps by drafts taken for {costs} ms{'; ' if parts else ''}{parts}",
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, with an MTP layer")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--acceptance", type=float, default=0.7, help="chance of each draft")
    parser.add_argument("--drafts", type=int, default=3, help="most drafts of a row")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[256], help="tokens of an answer: one number, or one a batch"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="time the graphs of a speculative step too")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    parser.add_argument("--kind", choices=["none", "mtp"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if len(options.tokens) == 1:
        options.tokens *= len(options.batches)
    elif len(options.tokens) != len(options.batches):
        parser.error(
            f"{len(options.tokens)} --tokens for {len(options.batches)} batches: give one number, or as many"
        )
    return options


if __name__ == "__main__":
    main()
