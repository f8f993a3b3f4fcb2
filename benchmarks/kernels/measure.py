"""Timing of GPU kernels by CUDA graph replay, and the rows that `benchmarks/results` keeps.

A kernel is captured once per input set, the sets together larger than the L2 cache; a sample is
the time between two events around one graph, divided by the calls in it.
"""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

RESULTS = Path(os.environ.get("KILN_BENCH_RESULTS", Path(__file__).parents[1] / "results"))
_NUM_SAMPLES = 60


@dataclass(frozen=True)
class Timing:
    """Percentiles of one call's time."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


def time_calls(calls: Sequence[Callable[[], object]], num_samples: int = _NUM_SAMPLES) -> Timing:
    """Time calls that run one after the other, each on its own inputs; figures are per call."""
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    pairs = []
    for _ in range(num_samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    samples = torch.tensor([start.elapsed_time(end) for start, end in pairs], dtype=torch.float64)
    p50, p90, p99 = (samples / len(calls)).quantile(torch.tensor([0.5, 0.9, 0.99]).double()).tolist()
    return Timing(p50, p90, p99)


def copy_bytes_per_s() -> float:
    """What a device copy of 2 GiB moves on this GPU, bytes read and written together.

    Timed outside a graph: a copy captured in one becomes a memory node, which an H200's copy engine
    carries out at two thirds of the rate of the kernel that a copy is otherwise.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 2 * source.nbytes / (sorted(times_ms)[len(times_ms) // 2] * 1e-3)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`‖actual - expected‖ / ‖expected‖`; infinite where `actual` is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class ResultTable:
    """Prints rows as they come and appends them to one CSV file.

    The memory floor of a row is the time a large device copy, measured here first, needs for
    the row's bytes.
    """

    def __init__(self, name: str, *, prints_rows: bool = True) -> None:
        self._prints_rows = prints_rows
        self._path = RESULTS / f"{name}.csv"
        self._common = {
            "commit": _commit(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        self.copy_bytes_per_s = copy_bytes_per_s()
        print(f"{self._common}: a large copy moves {self.copy_bytes_per_s / 1e12:.2f} TB/s", flush=True)

    def add(
        self, shape: str, timing: Timing, num_calls: int, num_bytes: int, error: float, note: str = ""
    ) -> None:
        """Record a kernel that a decode step calls `num_calls` times, moving `num_bytes` in all."""
        floor_ms = num_bytes / self.copy_bytes_per_s * 1e3
        row = self._common | {
            "shape": shape,
            "p50_ms": f"{timing.p50_ms * num_calls:.4f}",
            "p90_ms": f"{timing.p90_ms * num_calls:.4f}",
            "p99_ms": f"{timing.p99_ms * num_calls:.4f}",
            "bytes": num_bytes,
            "floor_fraction": f"{floor_ms / (timing.p50_ms * num_calls):.3f}",
            "relative_error": f"{error:.2e}",
            "note": note,
        }
        if self._prints_rows:
            print(
                f"{shape:58s} {row['p50_ms']} ms  p99 {row['p99_ms']}  floor {floor_ms:.4f}"
                f"  ({row['floor_fraction']})  error {row['relative_error']}  {note}",
                flush=True,
            )
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def _commit() -> str:
    """Of the working tree, or KILN_COMMIT where it came here without its history."""
    if "KILN_COMMIT" in os.environ:
        return os.environ["KILN_COMMIT"]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
