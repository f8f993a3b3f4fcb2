"""How much memory of its device this process holds."""

from __future__ import annotations

import sys
from pathlib import Path


def num_device_bytes() -> int:
    """Bytes that torch has reserved on the GPU; without one the process' own memory, as Linux counts it.

    Weights mapped from an engine are in neither.
    """
    torch = sys.modules.get("torch")  # loaded by the backend that uses it; what serves jobs does not need it
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
