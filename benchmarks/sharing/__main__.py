"""Serving while training: `python -m benchmarks.sharing --model FOLDER` (`--tiny` on a CPU).

Decode steps at 1k context, batch 16 and 64, without training and beside it: under MPS with training in
green contexts of 32, 64 and 96 multiprocessors and with the share that follows the load, in time slices,
and with training on a second GPU. Each way of sharing has an engine process of its own
(benchmarks/sharing/serving.py), since the driver decides about MPS when a process starts. Rows go to
benchmarks/results/sharing.csv.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kiln_cli.up.mps import MpsServer, MpsUnavailable, has_nvidia_gpu

ROOT = Path(__file__).resolve().parents[2]
MODES = ("mps", "time_slices", "own_gpu")
_MOST_SECONDS = 900.0


@contextmanager
def environment(mode: str) -> Iterator[dict[str, str]]:
    """Of the processes of one mode; an MPS server lives as long as the context.

    Raises:
        MpsUnavailable: there is none here.
    """
    base = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    with tempfile.TemporaryDirectory(prefix="kiln-mps-") as folder:
        if mode != "mps":
            # A folder without a server: whatever else runs on this machine, these are no clients of it.
            yield {**base, "CUDA_MPS_PIPE_DIRECTORY": folder}
            return
        server = MpsServer(Path(folder) / "pipe", Path(folder) / "log")
        server.start()
        try:
            yield {**base, **server.env}
        finally:
            server.stop()


def main() -> None:
    options = _options()
    num_gpus = torch.cuda.device_count() if has_nvidia_gpu() else 0
    least_gpus = {"mps": 1, "time_slices": 0, "own_gpu": 2}
    modes = [mode for mode in options.modes if num_gpus >= least_gpus[mode]]
    failed = []
    for mode in modes:
        command = [sys.executable, "-m", "benchmarks.sharing.serving", "--mode", mode]
        command += ["--model", str(options.model), *["--tiny"] * options.tiny]
        command += ["--row-seconds", str(options.row_seconds)]
        try:
            with environment(mode) as env:
                done = subprocess.run(command, cwd=ROOT, env=env, timeout=_MOST_SECONDS, check=False)
        except (MpsUnavailable, subprocess.TimeoutExpired) as error:
            print(f"{mode}: {error}", flush=True)
            failed.append(mode)
        else:
            failed += [mode] * (done.returncode != 0)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--row-seconds", type=float, default=4.0, help="least time a row is measured for")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
