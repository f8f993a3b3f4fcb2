"""Everything that is measured: `make bench PARTS="decode waves"`, or `python -m benchmarks decode waves`.

Each part is a process of its own, so that one that fails, or fills the GPU's memory, leaves the
others alone. On a GPU the engine's parts run at Qwen3.5-4B's shape with random weights, which are
written to --checkpoint once; without a GPU the same code runs on the demo model in tiny sizes, to
see that it works. Rows are appended to benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from kiln_engine.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[1]
ENGINE_PARTS = ("decode", "prefill", "waves", "prefix", "clients", "adapters", "idle")
PARTS = ("kernels", *ENGINE_PARTS, "speculation", "start", "http", "sharing", "swap", "training")
# Settings whose choices are all measured, one at a time, for the decode steps.
_VARIED = ("state_dtype", "kv_dtype", "quantization")


def commands(parts: list[str], model: Path, is_tiny: bool) -> Iterator[tuple[list[str], Path]]:
    """The processes to run, each with its working directory."""
    python, tiny = [sys.executable], ["--tiny"] * is_tiny
    if "kernels" in parts and not is_tiny:
        for script in kernel_scripts():
            yield [*python, script.name], script.parent
    engine_parts = [part for part in ENGINE_PARTS if part in parts]
    engine = [*python, "-m", "benchmarks.engine", "--model", str(model), *tiny]
    if engine_parts:
        yield [*engine, "--parts", *engine_parts], ROOT
    if "decode" in parts:
        for name, choice in setting_choices():
            yield [*engine, "--parts", "decode", "--set", f"{name}={choice}"], ROOT
    if "speculation" in parts:
        counts = ["--batches", "1", "4", "--tokens", "32", "--repeats", "1"] if is_tiny else []
        yield [*python, "-m", "benchmarks.engine.speculation", "--model", str(model), *counts], ROOT
    if "start" in parts:
        yield [*python, "-m", "benchmarks.engine.start", "--model", str(model)], ROOT
    if "http" in parts:
        yield [*python, "-m", "benchmarks.http", "--model", str(model), *tiny], ROOT
    if "swap" in parts:
        counts = ["--swaps", "20", "--jobs", "1"] if is_tiny else ["--swaps", "1000"]
        yield [*python, "-m", "benchmarks.swap", "--model", str(model), *counts], ROOT
    if "sharing" in parts:
        yield [*python, "-m", "benchmarks.sharing", "--model", str(model), *tiny], ROOT
    if "training" in parts:
        yield [*python, "-m", "benchmarks.training", *tiny], ROOT


def kernel_scripts() -> list[Path]:
    """Scripts of benchmarks/kernels; the other files there are their helpers."""
    scripts = sorted((ROOT / "benchmarks" / "kernels").glob("*.py"))
    return [path for path in scripts if "__main__" in path.read_text(encoding="utf-8")]


def setting_choices() -> list[tuple[str, str]]:
    """(setting, choice) for every explicit choice of the settings that are varied."""
    fields = EngineSettings.model_fields
    return [
        (name, choice)
        for name in _VARIED
        if name in fields
        for choice in get_args(fields[name].annotation)
        if choice != "auto" and choice != fields[name].default
    ]


def main() -> None:
    options = _options()
    is_tiny = not torch.cuda.is_available()
    model: Path = options.model or (ROOT / "demo" / "model" if is_tiny else options.checkpoint)
    if is_tiny:
        print("no GPU: tiny sizes on a CPU, to see that everything runs; the figures mean nothing")
    elif options.model is None:
        script = ROOT / "scripts" / "gpu" / "make_random_checkpoint.py"
        subprocess.run(
            [sys.executable, str(script), "--shape", "4b", "--mtp", "--out", str(model)], check=True
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    if is_tiny:
        environment.setdefault("KILN_BENCH_RESULTS", tempfile.mkdtemp(prefix="kiln-bench-"))
    failed = []
    for command, folder in commands(options.parts or list(PARTS), model, is_tiny):
        print(f"== {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
            failed.append(" ".join(command[1:]))
    for command_line in failed:
        print(f"FAILED: {command_line}")
    sys.exit(bool(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none is all")
    parser.add_argument("--model", type=Path, help="checkpoint folder to measure")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "kiln-bench-4b",
        help="where the random checkpoint is, or is written to (8.4 GB)",
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    main()
