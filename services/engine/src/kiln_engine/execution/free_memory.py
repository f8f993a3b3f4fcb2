"""How much memory there is for the pools, once the weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes_for_pools(device: torch.device, gpu_memory_fraction: float, weights_bytes: int) -> int:
    """What the pools may take: all that is free on a CPU; on a GPU the engine's share, less its weights.

    The rest of a GPU is the trainer's, whether it has taken it already or not.
    """
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached_file_bytes()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(free, int(total * gpu_memory_fraction) - weights_bytes))


def _cached_file_bytes() -> int:
    """Memory the kernel would give back from its file cache; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return max(0, kib.get("MemAvailable", 0) - kib.get("MemFree", 0)) * 1024
