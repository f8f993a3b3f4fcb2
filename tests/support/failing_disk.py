"""A file that is there and cannot be read, as on a disk or a network file system in trouble."""

from __future__ import annotations

from pathlib import Path


def break_file(path: Path) -> None:
    """Let every read of `path` fail with EIO (and every mapping with ENODEV).

    It becomes a link to the reader's own memory, of which nothing is mapped at address 0.
    """
    path.unlink()
    path.symlink_to("/proc/self/mem")
