"""What the engine took of its device's memory, and what the device has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def machine_memory() -> tuple[int, int]:
    """Free and total bytes of this machine."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes


def _unknown() -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`parts` are bytes by use, fixed at the start. `read` asks the device for its free and total bytes;
    it may be called from any thread and takes less than a millisecond."""

    parts: Mapping[str, int] = field(default_factory=dict)
    read: Callable[[], tuple[int, int]] = _unknown
