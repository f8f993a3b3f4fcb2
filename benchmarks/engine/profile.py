"""Where a decode step's time goes, kernel by kernel: `python -m benchmarks.engine.profile --model FOLDER`.

The batch decodes through scheduler, loop and runner; while it does, torch's profiler records what
runs on the GPU (inside CUDA graphs too). Times are per step. What is missing between the sum of the
kernels and the step is time in which the device had nothing to do. Profiling itself slows small
kernels a little: compare shares, and take the step's time from the other benchmarks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine.recording import Recorder
from benchmarks.engine.requests import random_requests
from benchmarks.engine.spine import Spine, UnknownSetting, make_settings
from kiln_common.logs import configure_logs

_MOST_SECONDS = 120.0
_NAME_WIDTH = 90


def profile_decode(
    spine: Spine, batch: int, context: int, duration_s: float
) -> tuple[float, int, Sequence[Any]]:
    """(seconds, decode steps, events by name) of a stretch of steady decoding."""
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]):  # the first one takes seconds to start
        torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu").sum().item()
    requests = random_requests(batch, context, 1_000_000, spine.config.vocab_size, time.time_ns())
    recorder = Recorder(batch)
    for request in requests:
        spine.loop.submit(request, (), recorder)
    arrivals = recorder.recording.arrivals
    _wait_until(lambda: sum(event.is_first for _, events in arrivals for event in events) == batch)
    num_settled = len(arrivals) + 8
    _wait_until(lambda: len(arrivals) >= num_settled)
    with profile(activities=[activity]) as recorded:
        first, started_s = len(arrivals), time.perf_counter()
        time.sleep(duration_s)
        num_steps, seconds = len(arrivals) - first, time.perf_counter() - started_s
    for request in requests:
        spine.loop.abort(request.request_id)
    return seconds, max(1, num_steps), recorded.key_averages()


def table(seconds: float, num_steps: int, events: Sequence[Any], num_lines: int) -> list[str]:
    """Lines of `launches a step, microseconds a step, share of the step, name`, costliest first."""
    times = [(_device_us(event), event.count, event.key) for event in events]
    times = sorted((entry for entry in times if entry[0] > 0), reverse=True)
    step_us = 1e6 * seconds / num_steps
    total_us = sum(entry[0] for entry in times) / num_steps
    lines = [
        f"{num_steps} steps of {step_us:.0f} us, {sum(entry[1] for entry in times) / num_steps:.0f} launches"
        f" each; {total_us:.0f} us of kernels ({100 * total_us / step_us:.1f} %)"
    ]
    for time_us, count, name in times[:num_lines]:
        per_step_us = time_us / num_steps
        lines.append(
            f"{count / num_steps:8.1f} {per_step_us:9.1f} us {100 * per_step_us / step_us:5.1f} %"
            f"  {name[:_NAME_WIDTH]}"
        )
    return lines


def _device_us(event: Any) -> float:
    """Of the event itself: on the device where there is one, else on the CPU."""
    if torch.cuda.is_available():
        return float(event.self_device_time_total)
    return float(event.self_cpu_time_total)


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
        for batch in options.batches:
            seconds, num_steps, events = profile_decode(spine, batch, options.context, options.seconds)
            print(f"== batch {batch}, context {options.context} and on")
            print("\n".join(table(seconds, num_steps, events, options.lines)), flush=True)


if __name__ == "__main__":
    main()
