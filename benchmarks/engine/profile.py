"""Where the time of a decode step or a prompt goes, kernel by kernel.

    python -m benchmarks.engine.profile --model FOLDER --batches 1 64 --adapters 8 --prefills 8192


The batch decodes through scheduler, loop and runner; while it does, torch's profiler records what
runs on the GPU (inside CUDA graphs too). Times are per step. Kernels that are launched before the ones
they wait for have ended overlap them: each moment is charged to the kernel that ends first, so that
the charges add up to the time in which anything ran.
The rest of the step is time in which the GPU had nothing to do. Profiling itself slows small kernels a
little: compare shares, and take the step's time from the other benchmarks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine.adapters import random_adapter_files
from benchmarks.engine.recording import Recorder
from benchmarks.engine.requests import make_request, random_prompt
from benchmarks.engine.spine import AdapterSlots, Spine, UnknownSetting, make_settings
from kiln_common.logs import configure_logs

_MOST_SECONDS = 120.0
_NAME_WIDTH = 90


@dataclass(frozen=True)
class Span:
    """One run of a kernel, in microseconds of one clock."""

    start_us: float
    end_us: float
    name: str


@dataclass
class Charge:
    """What the runs of one kernel add to the time in which anything runs."""

    num_runs: int = 0
    charged_us: float = 0.0
    # From its start to its end, waiting for others included.
    resident_us: float = 0.0


def charge(spans: Sequence[Span]) -> dict[str, Charge]:
    """Divide the time in which anything ran among the kernels: each moment to the one that ends first."""
    charges: dict[str, Charge] = {}
    last_end_us = float("-inf")
    # Stretches before `last_end_us` that no span so far covers, in order.
    gaps: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.end_us):
        own = charges.setdefault(span.name, Charge())
        own.num_runs += 1
        own.resident_us += span.end_us - span.start_us
        if span.start_us > last_end_us:
            gaps.append((last_end_us, span.start_us))
        own.charged_us += span.end_us - max(span.start_us, last_end_us)
        while gaps[-1][1] > span.start_us:  # the first gap has no beginning, so it stays
            gap_start_us, gap_end_us = gaps.pop()
            own.charged_us += gap_end_us - max(gap_start_us, span.start_us)
            if gap_start_us < span.start_us:
                gaps.append((gap_start_us, span.start_us))
        last_end_us = span.end_us
    return charges


def start_profiler() -> None:
    """The first recording takes seconds to start."""
    with profile(activities=[_activity()]):
        torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu").sum().item()


def profile_decode(
    spine: Spine, batch: int, context: int, duration_s: float, num_adapters: int = 0
) -> tuple[float, list[Span]]:
    """Seconds a decode step takes, and what ran on the GPU meanwhile divided by the steps' number.

    With `num_adapters`, that many are resident in slots 1 and on and the rows take turns with them.
    """
    run = time.time_ns()
    slots = [1 + row % num_adapters if num_adapters else 0 for row in range(batch)]
    requests = [
        make_request(
            random_prompt(context, spine.config.vocab_size, (run, row)),
            1_000_000,
            adapter=f"adapter-{slot}" if slot else None,
        )
        for row, slot in enumerate(slots)
    ]
    recorder = Recorder(batch)
    for request, slot in zip(requests, slots, strict=True):
        used: AdapterSlots = ((slot, 1.0),) if slot else ()
        spine.loop.submit(request, used, recorder)
    arrivals = recorder.recording.arrivals
    _wait_until(lambda: sum(event.is_first for _, events in arrivals for event in events) == batch)
    num_settled = len(arrivals) + 8
    _wait_until(lambda: len(arrivals) >= num_settled)
    with profile(activities=[_activity()]) as recorded:
        first = len(arrivals)
        time.sleep(duration_s)
        last = len(arrivals) - 1
    for request in requests:
        spine.loop.abort(request.request_id)
    return (arrivals[last][0] - arrivals[first][0]) / max(1, last - first), _spans(recorded)


def profile_prefill(spine: Spine, length: int) -> tuple[float, list[Span]]:
    """Seconds to the first token of one prompt, the second of its length, and what ran meanwhile."""
    prompts = [
        random_prompt(length, spine.config.vocab_size, (time.time_ns(), number)) for number in range(2)
    ]
    spine.run([make_request(prompts[0], 1)])  # warms up
    with profile(activities=[_activity()]) as recorded:
        duration_s = spine.run([make_request(prompts[1], 1)]).duration_s
    return duration_s, _spans(recorded)


def _activity() -> ProfilerActivity:
    return ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU


def _spans(recorded: profile) -> list[Span]:
    return [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events() or ()
        if event.device_type == DeviceType.CUDA
    ]


def table(step_s: float, spans: Sequence[Span], num_lines: int) -> list[str]:
    """Lines of `launches, microseconds charged, their share, microseconds resident, name`, costliest first."""
    step_us = 1e6 * step_s
    if not spans:
        return [f"a step takes {step_us:.0f} us; nothing ran on a GPU"]
    # The recording covers parts of steps at both ends.
    num_steps = (max(s.end_us for s in spans) - min(s.start_us for s in spans)) / step_us
    charges = sorted(charge(spans).items(), key=lambda item: -item[1].charged_us)
    busy_us = sum(own.charged_us for _, own in charges) / num_steps
    lines = [
        f"a step takes {step_us:.0f} us and {len(spans) / num_steps:.0f} launches;"
        f" something runs {busy_us:.0f} us of it ({100 * busy_us / step_us:.1f} %)"
    ]
    for name, own in charges[:num_lines]:
        lines.append(
            f"{own.num_runs / num_steps:8.1f} {own.charged_us / num_steps:9.1f} us"
            f" {100 * own.charged_us / num_steps / step_us:5.1f} %"
            f"  (resident {own.resident_us / num_steps:8.1f} us)  {name[:_NAME_WIDTH]}"
        )
    return lines


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _MOST_SECONDS
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the batch did not decode within {_MOST_SECONDS:.0f} s")
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefills", type=int, nargs="+", default=[], help="prompt lengths, each by itself")
    parser.add_argument("--adapters", type=int, default=0, help="decode with this many adapters mixed, too")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long to record")
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    options = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in options.set)
    try:
        settings = make_settings(options.model, **{"max_running": max(options.batches), **overrides})
    except UnknownSetting as error:
        print(f"skipped: this engine has no setting {error}")
        return
    configure_logs("profile", as_json=True)
    with Spine(settings) as spine:
        start_profiler()
        for slot, files in enumerate(random_adapter_files(spine.config, options.adapters, rank=16), 1):
            spine.upload_adapter(slot, *files)
        for batch in options.batches:
            for num_adapters in sorted({0, options.adapters}):
                step_s, spans = profile_decode(spine, batch, options.context, options.seconds, num_adapters)
                print(f"== batch {batch}, context {options.context} and on, {num_adapters} adapters")
                print("\n".join(table(step_s, spans, options.lines)), flush=True)
        for length in options.prefills:
            duration_s, spans = profile_prefill(spine, length)
            print(f"== one prompt of {length} tokens")
            print("\n".join(table(duration_s, spans, options.lines)), flush=True)


if __name__ == "__main__":
    main()
