"""Rows of `benchmarks/results`: printed as they come and appended to one CSV file."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = (
    *("commit", "gpu", "torch", "triton", "workload", "settings"),
    *("p50_ms", "p90_ms", "p99_ms", "mean_ms", "tok_per_s"),
    *("bytes", "floor_ms", "floor_fraction", "num_samples", "note"),
)


class ResultFile:
    """One CSV file of rows that share commit, GPU and versions.

    `folder` is benchmarks/results unless KILN_BENCH_RESULTS names another one.
    """

    def __init__(self, name: str, gpu: str, columns: Sequence[str] = COLUMNS) -> None:
        self._columns = columns
        folder = Path(os.environ.get("KILN_BENCH_RESULTS", RESULTS))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}.csv"
        self._common = {
            "commit": commit(),
            "gpu": gpu,
            "torch": _version("torch"),
            "triton": _version("triton"),
        }

    def add(self, workload: str, settings: str, **figures: Any) -> None:
        """Print one row and append it; figures that do not apply stay empty."""
        row = dict.fromkeys(self._columns, "") | self._common | {"workload": workload, "settings": settings}
        row |= {name: _rounded(name, value) for name, value in figures.items()}
        unknown = set(row) - set(self._columns)
        assert not unknown, unknown
        shown = "  ".join(f"{name} {row[name]}" for name in figures if row[name] != "")
        print(f"{workload:44s} [{settings}]  {shown}", flush=True)
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def commit() -> str:
    """Of the working tree, or KILN_COMMIT where it came here without its history."""
    if "KILN_COMMIT" in os.environ:
        return os.environ["KILN_COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _rounded(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        if name.endswith("_ms"):
            return f"{value:.3f}"
        return f"{value:.3f}" if name.endswith("fraction") else f"{value:.0f}"
    return value
