"""Leases that outlive their engine: a lock file tells a restarted engine who still maps old weights.

Each reader holds a shared lock for as long as it is attached; the kernel drops it if the reader
dies. A new engine that must fit beside the old arena waits until nobody holds one.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_POLL_S = 0.05


def take_lease(socket_path: Path) -> int:
    """Take a shared lock beside the socket; closing the returned descriptor gives it back."""
    fd = os.open(_lease_file(socket_path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def wait_for_old_leases(socket_path: str | Path, timeout_s: float) -> bool:
    """Wait, bounded, until no process is attached through this socket path; whether that came true.

    Call it before serving there: readers attached to the new arena would count as well.
    """
    if not _lease_file(Path(socket_path)).exists():
        return True
    fd = os.open(_lease_file(Path(socket_path)), os.O_RDWR | os.O_CLOEXEC)
    deadline_s = time.monotonic() + timeout_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    return False
                time.sleep(_POLL_S)
            else:
                return True
    finally:
        os.close(fd)


def _lease_file(socket_path: Path) -> Path:
    return socket_path.with_name(socket_path.name + ".leases")
