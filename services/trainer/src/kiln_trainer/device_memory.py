"""How much memory of its device this process holds."""

from __future__ import annotations

from pathlib import Path

import torch


def num_device_bytes() -> int:
    """Bytes that torch has reserved on the GPU; without one the process' own memory, as Linux counts it.

    Weights mapped from an engine are in neither.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
