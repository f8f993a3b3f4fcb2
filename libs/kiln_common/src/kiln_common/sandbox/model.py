"""What may be run in the sandbox, within which limits, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kiln_common.errors import ErrorKind, KilnError

MIB = 1024 * 1024


class Language(StrEnum):
    PYTHON = "python"
    SHELL = "shell"


@dataclass(frozen=True)
class Limits:
    """What one run may use, all its processes together."""

    time_s: float = 10.0  # on the clock, from the moment the code starts
    memory_bytes: int = 512 * MIB  # anonymous and shared memory of all processes, added up
    num_processes: int = 32  # the code's own included; threads count as processes
    output_bytes: int = MIB  # stdout and stderr together
    disk_bytes: int = 64 * MIB  # what may be added to the work folder; also the largest single file


class Stop(StrEnum):
    """The limit that ended the code."""

    TIME = "time_limit"
    MEMORY = "memory_limit"
    PROCESSES = "process_limit"
    OUTPUT = "output_limit"
    DISK = "disk_limit"


@dataclass(frozen=True)
class Result:
    """How the code ended. `exit_code` is 128 + signal for a signal, None where a limit ended it."""

    exit_code: int | None
    stdout: str
    stderr: str
    duration_s: float
    stopped: Stop | None = None
    message: str = ""  # which limit, with numbers; empty where the code ended by itself

    @property
    def is_success(self) -> bool:
        return self.exit_code == 0


@dataclass(frozen=True)
class Task:
    """What `outside` hands over, as JSON on stdin."""

    code: str
    command: list[str]  # the program that is given the code's path
    python_prefix: str
    work_folder: str
    mount_point: str
    user_id: int
    group_id: int
    address_space_bytes: int
    file_bytes: int
    num_processes: int


class SandboxUnavailable(KilnError):
    """This machine cannot isolate code, so none is run."""

    code = "sandbox_unavailable"
    kind = ErrorKind.UNAVAILABLE
    hint = (
        "Code runs only where Linux (5.14 or newer, x86_64 or aarch64) allows user namespaces: "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0 and "
        "user.max_user_namespaces above 0; a container needs them, or CAP_SYS_ADMIN, allowed to it."
    )

    def __init__(self, reason: str) -> None:
        super().__init__(f"code cannot be isolated on this machine, so it was not run: {reason}")
