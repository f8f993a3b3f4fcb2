"""Times the start of an engine process: `python -m benchmarks.engine.start --model FOLDER`.

The process is started as `kiln up` starts it, twice by default: the first start puts the files into
the page cache and compiled kernels into theirs, the last one counts. Its parts are the times between
the lines of its own log, from the start of the process to the line that says it serves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.engine.results import ResultFile, device_name

READY = "engine_ready"
_MOST_SECONDS = 240.0


class StartFailed(Exception):
    """The engine ended before it served; its log says why."""


def timeline_of(lines: list[tuple[float, str]]) -> list[tuple[str, float]]:
    """(event, seconds since the event before) of JSON log lines with their times since the start.

    Lines of one event in a row count as one, at the time of the last.
    """
    timeline: list[tuple[str, float]] = []
    last_s = 0.0
    for time_s, line in lines:
        try:
            event = json.loads(line)["event"]
        except (ValueError, KeyError, TypeError):
            continue
        if timeline and timeline[-1][0] == event:
            timeline[-1] = (event, timeline[-1][1] + time_s - last_s)
        else:
            timeline.append((event, time_s - last_s))
        last_s = time_s
    return timeline


def start_once(model: Path, environment: dict[str, str]) -> list[tuple[float, str]]:
    """Start an engine, wait until it serves, stop it; its log lines and when they came.

    Raises:
        StartFailed: it ended, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-start-") as folder:
        environment = {
            **os.environ,
            "KILN_ENGINE_MODEL_PATH": str(model),
            "KILN_ENGINE_LISTEN": f"unix:{folder}/engine.sock",
            "KILN_ENGINE_SOCKET_DIR": folder,
            "KILN_ENGINE_DRAIN_TIMEOUT_S": "0",
            **environment,
        }
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "kiln_engine"], stderr=subprocess.PIPE, text=True, env=environment
        )
        lines: list[tuple[float, str]] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append((time.perf_counter() - started_s, line))
                if f'"{READY}"' in line or lines[-1][0] > _MOST_SECONDS:
                    break
        finally:
            process.terminate()
            process.communicate(timeout=30)
    if not lines or f'"{READY}"' not in lines[-1][1]:
        raise StartFailed("".join(line for _, line in lines[-20:]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--starts", type=int, default=2, help="how often; the last one counts")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    options = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in options.set)
    environment = {f"KILN_ENGINE_{name.upper()}": value for name, value in overrides.items()}
    for number in range(1, options.starts + 1):
        lines = start_once(options.model, environment)
        print(f"start {number}: {lines[-1][0]:.2f} s", flush=True)
    timeline = timeline_of(lines)
    for event, seconds in timeline:
        print(f"  {seconds:7.2f} s until {event}")
    total_ms = 1e3 * lines[-1][0]
    ResultFile("engine", device_name()).add(
        "engine start, process to ready",
        ", ".join(f"{name} {value}" for name, value in overrides.items()) or "defaults",
        p50_ms=total_ms,
        num_samples=1,
        note="; ".join(f"{event} +{seconds:.2f} s" for event, seconds in timeline),
    )


if __name__ == "__main__":
    main()
