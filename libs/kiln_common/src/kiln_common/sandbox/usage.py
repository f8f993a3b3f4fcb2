"""How much a sandbox uses now, read from its own /proc and its work folder."""

from __future__ import annotations

import os

_COUNTED_MEMORY = (b"RssAnon:", b"RssShmem:", b"VmSwap:", b"HugetlbPages:")
_INODE_BYTES = 4096


class ProcessUsage:
    """Counts the processes of one sandbox and their memory.

    `proc_fd` is the sandbox's own /proc, which lists all of its processes and none else; this
    object closes it. Memory that processes share is counted once for each.
    """

    def __init__(self, proc_fd: int) -> None:
        self._proc_fd = proc_fd

    def close(self) -> None:
        os.close(self._proc_fd)

    def read(self) -> tuple[int, int]:
        """Processes and threads of the code, and the bytes they hold."""
        num_processes = memory_bytes = 0
        for name in os.listdir(self._proc_fd):
            if not name.isdigit() or name == "1":  # 1 is the sandbox's own
                continue
            try:
                text = self._read_status(name)
            except OSError:
                continue  # ended meanwhile
            for line in text.splitlines():
                if line.startswith(_COUNTED_MEMORY):
                    memory_bytes += int(line.split()[1]) * 1024
                elif line.startswith(b"Threads:"):
                    num_processes += int(line.split()[1])
        return num_processes, memory_bytes

    def _read_status(self, name: str) -> bytes:
        status_fd = os.open(f"{name}/status", os.O_RDONLY, dir_fd=self._proc_fd)
        try:
            return os.read(status_fd, 8192)
        finally:
            os.close(status_fd)


def folder_bytes(folder: str) -> int:
    """What the files below `folder` take on the disk; an empty one counts as 4 KiB."""
    total = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += max(entry.stat(follow_symlinks=False).st_blocks * 512, _INODE_BYTES)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError:
            continue  # removed meanwhile, or closed to us
    return total
