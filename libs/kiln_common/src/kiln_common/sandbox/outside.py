"""Starts a sandbox, watches what it uses, and ends it: the side the code cannot reach."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from kiln_common.errors import InvalidValue
from kiln_common.sandbox.model import MIB, Language, Limits, Result, SandboxUnavailable, Stop, Task
from kiln_common.sandbox.usage import FolderUsage, ProcessUsage, folder_usage

_POLL_S = 0.02
_DISK_POLL_S = 0.2
_SETUP_S = 20.0
_NOBODY_ID = 65534
_MOST_CODE_BYTES = MIB
# The kernel's own bounds lie above ours: ours end the code with a message, these hold meanwhile.
_SPARE_PROCESSES = 16
_ADDRESS_SPACE_FACTOR = 4


def run(code: str, language: Language, work_folder: Path, limits: Limits | None = None) -> Result:
    """Run `code` in `work_folder`, the one place where it may write, and wait for its end.

    The code sees the system's programs and this Python's standard library, read-only, and the work
    folder as its current directory. It has no network (not even loopback) and no stdin. Blocks the
    calling thread, which looks at what is used every 20 ms.

    Where Kiln runs as root, the code runs as the folder's owner, and as nobody in a folder of
    root's, which is given to nobody (the folder itself, not what is in it).

    Raises:
        SandboxUnavailable: this machine cannot isolate code; nothing was run.
        InvalidValue: `work_folder` is not a folder, or the code is longer than 1 MiB or not text.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"{sys.platform} has no namespaces")
    if not work_folder.is_dir():
        raise InvalidValue(f"the work folder {str(work_folder)!r} is not a folder", param="work_folder")
    _check_code(code)
    with tempfile.TemporaryDirectory(prefix="kiln-sandbox-") as mount_point:
        task = _task(code, language, work_folder.resolve(), mount_point, limits)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, contextlib.ExitStack() as stack:
            with theirs:
                process = stack.enter_context(_start(theirs.fileno()))
            sandbox = _Sandbox(process, ours, stack)
            try:
                sandbox.hand_over(task)
                return sandbox.watch(limits, task.work_folder)
            finally:
                sandbox.kill()


def _check_code(code: str) -> None:
    try:
        num_bytes = len(code.encode())
    except UnicodeEncodeError:
        raise InvalidValue("the code has characters that are not Unicode text", param="code") from None
    if num_bytes > _MOST_CODE_BYTES:
        raise InvalidValue(f"the code has {num_bytes} bytes, the limit is {_MOST_CODE_BYTES}", param="code")


def _task(code: str, language: Language, work_folder: Path, mount_point: str, limits: Limits) -> Task:
    user_id, group_id = os.geteuid(), os.getegid()
    if user_id == 0:
        owner = work_folder.stat()
        user_id, group_id = owner.st_uid, owner.st_gid
        if user_id == 0:
            user_id = group_id = _NOBODY_ID
            os.chown(work_folder, user_id, group_id)
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    shell = next(path for path in ("/bin/bash", "/bin/sh") if os.path.exists(path))
    return Task(
        code=code,
        command=[python, "-B", "-s"] if language is Language.PYTHON else [shell],
        python_prefix=os.path.realpath(sys.base_prefix),
        work_folder=str(work_folder),
        mount_point=mount_point,
        user_id=user_id,
        group_id=group_id,
        address_space_bytes=limits.memory_bytes * _ADDRESS_SPACE_FACTOR,
        file_bytes=limits.disk_bytes,
        num_processes=limits.num_processes + _SPARE_PROCESSES,
    )


def _start(status_fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "kiln_common.sandbox.inside", str(status_fd)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LANG": "C.UTF-8"},
        pass_fds=[status_fd],
        start_new_session=True,
    )


def _hides_files(before: FolderUsage, now: FolderUsage) -> tuple[Stop, str] | None:
    """What cannot be counted may be any size."""
    if now.num_unread <= before.num_unread:
        return None
    return Stop.DISK, (
        f"the code was stopped: {now.num_unread - before.num_unread} new folders of the work folder cannot be "
        "read to count what is in them; they are closed, or more than 64 deep"
    )


class _Sandbox:
    """One sandbox from its start to its end."""

    def __init__(
        self, process: subprocess.Popen[bytes], status: socket.socket, stack: contextlib.ExitStack
    ) -> None:
        self._process = process
        self._status = status
        self._stack = stack
        self._first_process_id: int | None = None
        self._usage: ProcessUsage | None = None

    def hand_over(self, task: Task) -> None:
        """Give the sandbox its task and wait until the code starts."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(asdict(task)).encode())
        self._status.settimeout(_SETUP_S)
        while self._usage is None or self._first_process_id is None:
            try:
                message, fds, _, _ = socket.recv_fds(self._status, 65536, 1)
            except TimeoutError:
                raise SandboxUnavailable(f"it was not ready within {_SETUP_S:g} s") from None
            if not message:
                raise SandboxUnavailable(self._last_words())
            facts = json.loads(message)
            if "error" in facts:
                raise SandboxUnavailable(facts["error"])
            self._first_process_id = facts.get("first_process_id", self._first_process_id)
            if fds:
                os.set_inheritable(fds[0], False)
                self._usage = ProcessUsage(fds[0])
                self._stack.callback(self._usage.close)

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        self._process.wait()
        return self._process.stderr.read(4096).decode(errors="replace").strip() or "it ended at its start"

    def watch(self, limits: Limits, work_folder: str) -> Result:
        """Collect the output until the code ends or a limit is passed."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        stdout, stderr = bytearray(), bytearray()
        output = {self._process.stdout.fileno(): stdout, self._process.stderr.fileno(): stderr}
        started_s = next_disk_look_s = time.monotonic()
        disk_before = disk = folder_usage(work_folder)
        stopped: tuple[Stop, str] | None = None
        with selectors.DefaultSelector() as selector:
            for pipe_fd in output:
                selector.register(pipe_fd, selectors.EVENT_READ)
            # The sandbox's own processes hold the pipes: they end when everything in it has.
            while selector.get_map() and stopped is None:
                for key, _ in selector.select(_POLL_S):
                    chunk = os.read(key.fd, 65536)
                    output[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                look_s = time.monotonic()
                if look_s >= next_disk_look_s:
                    disk = folder_usage(work_folder)
                    # A large folder takes long to look through: a tenth of the time at most.
                    next_disk_look_s = look_s + max(_DISK_POLL_S, 10 * (time.monotonic() - look_s))
                num_output_bytes = sum(map(len, output.values()))
                seconds = time.monotonic() - started_s
                num_disk_bytes = disk.num_bytes - disk_before.num_bytes
                stopped = self._passed_limit(limits, seconds, num_output_bytes, num_disk_bytes)
                stopped = stopped or _hides_files(disk_before, disk)
        duration_s = time.monotonic() - started_s
        return Result(
            exit_code=None if stopped else self._process.wait(),
            stdout=stdout[: limits.output_bytes].decode(errors="replace"),
            stderr=stderr[: limits.output_bytes].decode(errors="replace"),
            duration_s=duration_s,
            stopped=stopped[0] if stopped else None,
            message=stopped[1] if stopped else "",
        )

    def _passed_limit(
        self, limits: Limits, seconds: float, num_output_bytes: int, num_disk_bytes: int
    ) -> tuple[Stop, str] | None:
        assert self._usage is not None
        num_processes, memory_bytes = self._usage.read()
        for stop, used, most, unit in (
            (Stop.PROCESSES, num_processes, limits.num_processes, "processes and threads"),
            (Stop.MEMORY, memory_bytes, limits.memory_bytes, "bytes of memory"),
            (Stop.OUTPUT, num_output_bytes, limits.output_bytes, "bytes of output"),
            (Stop.DISK, num_disk_bytes, limits.disk_bytes, "bytes added to the work folder"),
            (Stop.TIME, round(seconds, 2), limits.time_s, "seconds"),
        ):
            if used > most:
                return stop, f"the code was stopped at {used} {unit}; the limit is {most}"
        return None

    def kill(self) -> None:
        """End every process of the sandbox; all are gone when this returns."""
        if self._process.poll() is not None:
            return
        if self._first_process_id is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first_process_id, signal.SIGKILL)
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
