"""How much a sandbox uses now, read from its own /proc and its work folder."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

_COUNTED_MEMORY = (b"RssAnon:", b"RssShmem:", b"VmSwap:", b"HugetlbPages:")
_INODE_BYTES = 4096
# Folders within each other that are looked through: each is an open file meanwhile.
_MOST_DEPTH = 64
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # removed meanwhile, or something else now


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


@dataclass
class FolderUsage:
    """What the files below a folder take on the disk, and how many folders could not be read."""

    num_bytes: int = 0
    num_unread: int = 0


def folder_usage(folder: str) -> FolderUsage:
    """Look through a folder that may change meanwhile. An empty file counts as 4 KiB.

    Folders closed to this user, and those more than 64 deep, are not read but counted as such.
    Files that are open and have no name any more are not seen.
    """
    usage = FolderUsage()
    _count(usage, folder, None, 1)
    return usage


def _count(usage: FolderUsage, name: str, parent_fd: int | None, depth: int) -> None:
    """By open folders rather than paths, whose length is limited."""
    if depth > _MOST_DEPTH:
        usage.num_unread += 1
        return
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
    except OSError as error:
        usage.num_unread += error.errno not in _GONE
        return
    try:
        inner = []
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed meanwhile
                usage.num_bytes += max(found.st_blocks * 512, _INODE_BYTES)
                if stat.S_ISDIR(found.st_mode):
                    inner.append(entry.name)
        for each in inner:
            _count(usage, each, fd, depth + 1)
    except OSError:
        usage.num_unread += 1
    finally:
        os.close(fd)
