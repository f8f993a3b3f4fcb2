"""The folder of one `kiln up`: who has it, and where that one answers."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from kiln_cli.errors import StateDirInUse


def default_state_dir() -> Path:
    """~/.local/state/kiln, or below XDG_STATE_HOME where that is set."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kiln"


class StateDirLock:
    """Holds a state folder for one `kiln up` and its services, which inherit `fd`.

    The folder is free again once the last of them has gone, so that no service of a supervisor that
    was killed is still there when the next one starts. Until then a new lock waits, up to `wait_s`;
    it does not wait for a supervisor that is alive.

    Raises:
        StateDirInUse: somebody else has it.
    """

    def __init__(self, state_dir: Path, *, wait_s: float = 60.0) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = _lock_file(state_dir).open("a+")
        deadline = time.monotonic() + wait_s
        while not self._try_lock():
            if _is_alive(self._holder()) or time.monotonic() > deadline:
                self._file.close()
                raise StateDirInUse(f"another kiln up uses {state_dir}")
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def announce(self, url: str) -> None:
        """Say where these services answer, for `running_url`."""
        self._file.write(f"{url}\n")
        self._file.flush()

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> StateDirLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _holder(self) -> int:
        self._file.seek(0)
        text = self._file.readline().strip()
        return int(text) if text.isdigit() else 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def running_url(state_dir: Path) -> str | None:
    """Where the `kiln up` that has this folder answers; None while none has it."""
    try:
        with _lock_file(state_dir).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:  # somebody has it
                return file.read().splitlines()[1]
    except (OSError, IndexError):
        pass
    return None


def _lock_file(state_dir: Path) -> Path:
    return state_dir / "lock"
