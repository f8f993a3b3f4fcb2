"""The sandbox's work folder: what is in it is counted, and it goes whatever is in it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiln_common.sandbox import work_folder
from kiln_common.sandbox.usage import folder_usage


@contextlib.contextmanager
def _as_ordinary_user(folder: Path) -> Iterator[None]:
    """File permissions hold for this process, as they do not for root."""
    if os.geteuid() != 0:
        yield
        return
    for parent in [folder, *folder.parents]:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    os.chown(folder, 54321, 54321)
    os.seteuid(54321)
    try:
        yield
    finally:
        os.seteuid(0)


def _nest(folder: Path, depth: int, name: str) -> int:
    """Folders within each other; the open fd of the innermost."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


def test_closed_folders_are_noticed(tmp_path: Path):
    with _as_ordinary_user(tmp_path):
        assert folder_usage(str(tmp_path)).num_unread == 0
        (tmp_path / "closed").mkdir(mode=0o300)
        (tmp_path / "closed" / "file").write_bytes(bytes(4096))
        assert folder_usage(str(tmp_path)).num_unread == 1
        (tmp_path / "closed").chmod(0o700)


def test_a_work_folder_is_removed_whatever_was_left_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with _as_ordinary_user(tmp_path), work_folder() as folder:
        os.close(_nest(folder.path, 1500, "a" * 20))
        (folder.path / "link").symlink_to("/")
        for mode in (0o000, 0o300, 0o500):
            closed = folder.path / f"{mode:o}"
            (closed / "inner").mkdir(parents=True)
            (closed / "inner").chmod(mode)
            closed.chmod(mode)
        folder.path.chmod(0)
    assert folder.is_removed
    assert not [*tmp_path.iterdir()]


def test_a_work_folder_that_cannot_be_removed_raises_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with work_folder() as folder:
        folder.path.rename(tmp_path / "elsewhere")
    assert not folder.is_removed
