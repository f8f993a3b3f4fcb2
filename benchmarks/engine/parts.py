"""The workloads of the table, each a function that runs on a started engine and adds its rows."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engine.adapters import random_adapter_files
from benchmarks.engine.floor import ModelCosts, StepCost, Yardsticks
from benchmarks.engine.recording import DecodeWindow, Distribution, TooFewSteps
from benchmarks.engine.requests import make_request, random_prompt, random_requests
from benchmarks.engine.results import ResultFile
from benchmarks.engine.spine import AdapterSlots, Spine
from benchmarks.engine.workloads import Sizes


@dataclass
class Bench:
    """A started engine, what it is compared with, and where its figures go."""

    spine: Spine
    sizes: Sizes
    costs: ModelCosts
    yardsticks: Yardsticks
    results: ResultFile
    settings: str
    _seeds: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def vocab_size(self) -> int:
        return self.spine.config.vocab_size

    def new_seed(self) -> int:
        """Of prompts that nothing before has put into the prefix cache."""
        return next(self._seeds)

    def add(self, workload: str, times: Distribution, cost: StepCost | None, **figures: object) -> None:
        """Record `times` beside the floor of `cost`; the fraction is that of the mean."""
        floor_ms = 1e3 * cost.floor_s(self.yardsticks) if cost else None
        self.results.add(
            workload,
            self.settings,
            p50_ms=times.p50_ms,
            p90_ms=times.p90_ms,
            p99_ms=times.p99_ms,
            mean_ms=times.mean_ms,
            bytes=cost.num_bytes if cost else None,
            floor_ms=floor_ms,
            floor_fraction=floor_ms / times.mean_ms if floor_ms else None,
            num_samples=times.num_samples,
            **figures,
        )


def decode(bench: Bench) -> None:
    """One sequence, then batches: the time of a step in which every sequence decodes."""
    sizes = bench.sizes
    runs = []
    for _ in range(sizes.repeats + 1):  # the first one warms up
        requests = random_requests(
            1, sizes.single_prompt, sizes.single_output, bench.vocab_size, bench.new_seed()
        )
        runs.append(bench.spine.run(requests).decode_window())
    _add_steps(
        bench,
        f"decode, batch 1, {sizes.single_prompt} -> {sizes.single_output}",
        1,
        sizes.single_prompt,
        runs[1:],
    )
    for context, batch in sizes.decode_batches:
        prompt, windows = _decode_windows(bench, context, batch)
        _add_steps(bench, f"decode step, batch {batch}, context {context}", batch, prompt, windows)


def _decode_windows(
    bench: Bench,
    context: int,
    batch: int,
    slots: Sequence[AdapterSlots] | None = None,
    names: Sequence[str | None] | None = None,
) -> tuple[int, list[DecodeWindow]]:
    """Prompt length, and one window for each repeat, whose mean context is about `context`."""
    sizes = bench.sizes
    budget = bench.spine.parts.limits.step_token_budget
    num_prefill_steps = math.ceil(batch * context / max(1, budget - batch)) + 2
    prompt = max(1, context - (num_prefill_steps + sizes.decode_steps) // 2)
    max_tokens = num_prefill_steps + sizes.decode_steps + 8
    names = names or [None] * batch

    def run(prompt_tokens: int, output_tokens: int) -> DecodeWindow:
        seed = bench.new_seed()
        requests = [
            make_request(
                random_prompt(prompt_tokens, bench.vocab_size, (seed, index)),
                output_tokens,
                seed=index,
                adapter=name,
            )
            for index, name in enumerate(names)
        ]
        return bench.spine.run(requests, slots).decode_window()

    _try(lambda: run(min(32, prompt), 32 + num_prefill_steps))  # warms up
    return prompt, [run(prompt, max_tokens) for _ in range(sizes.repeats)]


def _try(warm_up: Callable[[], object]) -> None:
    """A warm-up need not be long enough to be timed."""
    try:
        warm_up()
    except TooFewSteps:
        return


def _add_steps(
    bench: Bench, workload: str, batch: int, prompt: int, windows: Sequence[DecodeWindow], note: str = ""
) -> float:
    """Percentiles over all repeats, the mean as the median of the repeats' means; returns it in seconds."""
    pooled = Distribution.of([step_s for window in windows for step_s in window.steps_s])
    mean_s = statistics.median(window.mean_s for window in windows)
    times = Distribution(pooled.p50_ms, pooled.p90_ms, pooled.p99_ms, 1e3 * mean_s, pooled.num_samples)
    context = prompt + statistics.fmean(window.mean_num_outputs for window in windows)
    cost = bench.costs.decode_step(batch, context)
    bench.add(workload, times, cost, tok_per_s=batch / mean_s, note=f"mean context {context:.0f}{note}")
    return mean_s


def waves(bench: Bench) -> None:
    """Requests submitted at once, prefill included: output tokens over the whole time."""
    sizes = bench.sizes
    for count in sizes.wave_counts:
        runs = []
        for repeat in range(sizes.repeats + 1):
            prompt, output = sizes.wave_prompt, sizes.wave_output
            if repeat == 0:  # warms up
                prompt, output = min(prompt, 128), min(output, 16)
            requests = random_requests(count, prompt, output, bench.vocab_size, bench.new_seed())
            runs.append(bench.spine.run(requests))
        rates = [run.num_tokens / run.duration_s for run in runs[1:]]
        first = Distribution.of([time_s for run in runs[1:] for time_s in run.first_token_s])
        bench.add(
            f"wave, {count} at once, {sizes.wave_prompt} -> {sizes.wave_output}",
            first,
            None,
            tok_per_s=statistics.median(rates),
            note=f"times are to the first token; {_range(rates)} tok/s",
        )


def clients(bench: Bench) -> None:
    """The workload of the HTTP benchmark without HTTP: what a gateway's figure is compared with."""
    sizes = bench.sizes
    count, num_clients = sizes.client_requests, sizes.num_clients
    bench.spine.run(random_requests(num_clients, 64, 8, bench.vocab_size, bench.new_seed()))  # warms up
    rates = []
    for _ in range(sizes.repeats):
        requests = random_requests(
            count, sizes.wave_prompt, sizes.wave_output, bench.vocab_size, bench.new_seed()
        )
        run = bench.spine.run_clients(requests, num_clients)
        rates.append(run.num_tokens / run.duration_s)
    bench.results.add(
        f"{num_clients} clients, {count} requests, {sizes.wave_prompt} -> {sizes.wave_output}",
        bench.settings,
        tok_per_s=statistics.median(rates),
        num_samples=len(rates),
        note=f"no HTTP; {_range(rates)} tok/s",
    )


def prefill(bench: Bench) -> None:
    """One prompt by itself: the time to its first token."""
    for length in bench.sizes.prefill_lengths:
        times = []
        for _ in range(bench.sizes.repeats + 1):
            request = make_request(random_prompt(length, bench.vocab_size, bench.new_seed()), 1)
            times.append(bench.spine.run([request]).duration_s)
        first, *rest = times
        timed = Distribution.of(rest)
        bench.add(
            f"prefill, one prompt of {length}",
            timed,
            bench.costs.prefill(length),
            tok_per_s=1e3 * length / timed.p50_ms,
            note=f"the first one took {1e3 * first:.1f} ms",
        )


def prefix(bench: Bench) -> None:
    """Requests that share a long prefix, one after the other: the time to each one's first token."""
    sizes = bench.sizes
    length = sizes.shared_prefix + sizes.after_prefix
    by_turn: list[list[float]] = [[], [], []]
    cached = [0, 0, 0]
    for _ in range(sizes.repeats + 1):  # the first one warms up
        shared = random_prompt(sizes.shared_prefix, bench.vocab_size, bench.new_seed())
        for turn in range(3):
            own = random_prompt(sizes.after_prefix, bench.vocab_size, bench.new_seed())
            run = bench.spine.run([make_request(shared + own, 1)])
            by_turn[turn].append(run.duration_s)
            cached[turn] = run.num_cached_tokens[0]
    for turn, name in enumerate(("first", "second", "third")):
        bench.add(
            f"prefix {sizes.shared_prefix} + {sizes.after_prefix}, {name} request",
            Distribution.of(by_turn[turn][1:]),
            bench.costs.prefill(length - cached[turn], cached[turn]),
            note=f"time to the first token, {cached[turn]} tokens cached",
        )


def adapters(bench: Bench) -> None:
    """A decode batch before any adapter is there, with none of its rows using one, and with all mixed."""
    sizes = bench.sizes
    context, batch = sizes.adapter_batch
    workload = f"batch {batch}, context {context}"
    files = random_adapter_files(bench.spine.config, sizes.num_adapters, sizes.adapter_rank)
    prompt, windows = _decode_windows(bench, context, batch)
    without_s = _add_steps(bench, f"adapters: {workload}, none resident", batch, prompt, windows)
    staging_s = []
    for slot, (adapter_bytes, config_json) in enumerate(files, 1):
        started_s = time.perf_counter()
        bench.spine.upload_adapter(slot, adapter_bytes, config_json)
        staging_s.append(time.perf_counter() - started_s)
    bench.add(f"adapter of rank {sizes.adapter_rank}, bytes to resident", Distribution.of(staging_s), None)

    def add(name: str, slots: list[AdapterSlots] | None, names: list[str | None] | None) -> None:
        prompt, windows = _decode_windows(bench, context, batch, slots, names)
        mean_s = statistics.median(window.mean_s for window in windows)
        _add_steps(
            bench,
            f"adapters: {workload}, {name}",
            batch,
            prompt,
            windows,
            f"; {100 * without_s / mean_s:.1f} % of the rate with none resident",
        )

    add("none in the batch", None, None)
    rows = [1 + row % sizes.num_adapters for row in range(batch)]
    mixed: list[AdapterSlots] = [((slot, 1.0),) for slot in rows]
    add(
        f"{sizes.num_adapters} of rank {sizes.adapter_rank} mixed",
        mixed,
        [f"adapter-{slot}" for slot in rows],
    )


def idle(bench: Bench) -> None:
    """Processor time of the whole process while the engine has nothing to do."""
    bench.spine.run(random_requests(1, 8, 2, bench.vocab_size, bench.new_seed()))
    time.sleep(0.1)
    before_s, started_s = time.process_time(), time.perf_counter()
    time.sleep(bench.sizes.idle_s)
    share = (time.process_time() - before_s) / (time.perf_counter() - started_s)
    bench.results.add("idle engine", bench.settings, note=f"{100 * share:.2f} % of one core")


def _range(rates: Sequence[float]) -> str:
    return f"{min(rates):.0f}-{max(rates):.0f}"


PARTS: dict[str, Callable[[Bench], None]] = {
    "decode": decode,
    "prefill": prefill,
    "waves": waves,
    "prefix": prefix,
    "clients": clients,
    "adapters": adapters,
    "idle": idle,
}
