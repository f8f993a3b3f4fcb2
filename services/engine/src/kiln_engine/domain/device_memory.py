"""What the engine took of its device's memory, and what the device has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _unknown() -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`parts` are bytes by use, fixed at the start. `read` asks the device for its free and total bytes;
    it may be called from any thread and takes less than a millisecond."""

    parts: Mapping[str, int] = field(default_factory=dict)
    read: Callable[[], tuple[int, int]] = _unknown
