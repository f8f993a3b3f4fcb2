"""A folder of its own for one run of the sandbox, and its removal whatever the code left in it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = "work"


@dataclass
class WorkFolder:
    """`path` is empty at first. After the block: whether all of it is gone."""

    path: Path
    is_removed: bool = False


@contextlib.contextmanager
def work_folder() -> Iterator[WorkFolder]:
    """An empty folder while the block runs. A removal that fails is logged and told, never raised."""
    outer = tempfile.mkdtemp(prefix="kiln-work-")
    folder = WorkFolder(Path(outer) / _NAME)
    folder.path.mkdir()
    try:
        yield folder
    finally:
        try:
            _remove(outer)
            folder.is_removed = True
        except OSError as error:
            import structlog  # the sandbox itself needs nothing beyond Python

            structlog.get_logger().warning("work_folder_not_removed", folder=outer, reason=error.strerror)


def _remove(outer: str) -> None:
    """Each folder is moved up before it is looked into: no depth, and no length of a path, is too much."""
    outer_fd = os.open(outer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        waiting = [_NAME]
        num_moved = 0
        while waiting:
            name = waiting.pop()
            os.chmod(name, 0o700, dir_fd=outer_fd)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer_fd)
            try:
                with os.scandir(fd) as entries:
                    found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                for inner, is_folder in found:
                    if not is_folder:
                        os.unlink(inner, dir_fd=fd)
                        continue
                    os.chmod(inner, 0o700, dir_fd=fd)  # only who may write to a folder may move it
                    num_moved += 1
                    os.rename(inner, str(num_moved), src_dir_fd=fd, dst_dir_fd=outer_fd)
                    waiting.append(str(num_moved))
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=outer_fd)
    finally:
        os.close(outer_fd)
    os.rmdir(outer)
