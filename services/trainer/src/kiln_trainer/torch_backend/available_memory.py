"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def device_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, what torch keeps for this process included."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)


def host_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """What the host, and a container's limit, leave; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        in_use = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or none with a limit ("max")
        return available
    return min(available, max(0, limit - in_use))
