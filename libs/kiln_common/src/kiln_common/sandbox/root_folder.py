"""The file system the code sees: the system's programs read-only, one work folder, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from kiln_common.sandbox.syscalls import (
    ATTR_NO_DEV,
    ATTR_NO_SUID,
    ATTR_READ_ONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    enter_root,
    mount,
    set_mount_attributes,
)

WORK_PATH = "/sandbox/work"
CODE_PATH = "/sandbox/code"
_SYSTEM_FOLDERS = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/alternatives",
    "/etc/ld.so.cache",
)
# No /dev/zero: mapped shared it is memory that belongs to no process.
_DEVICES = ("null", "random", "urandom")
_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/shm": "/tmp",
}
_TEMPORARY_BYTES = 16 * 1024 * 1024


def build_and_enter(mount_point: str, *, python_prefix: str, work_folder: str, code: str) -> None:
    """Build the root on `mount_point` and make it the only one; needs the namespaces' privileges.

    The host's other folders (homes, /etc, /run, /var, /tmp) do not exist in it.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", mount_point, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,nr_inodes=1024,mode=0755")
    root = Path(mount_point)
    for folder in (*_SYSTEM_FOLDERS, python_prefix):
        _show_read_only(folder, root)
    for device in _DEVICES:
        _bind(f"/dev/{device}", root / "dev" / device)
    for link, target in _LINKS.items():
        (root / link[1:]).symlink_to(target)
    _mount_fresh("proc", root / "proc", None)
    _mount_fresh("tmpfs", root / "tmp", f"size={_TEMPORARY_BYTES},nr_inodes=4096,mode=1777")
    code_folder = root / CODE_PATH[1:]
    code_folder.mkdir(parents=True)
    (code_folder / "main").write_text(code, encoding="utf-8")
    work = root / WORK_PATH[1:]
    _bind(work_folder, work)
    set_mount_attributes(str(work), ATTR_NO_SUID | ATTR_NO_DEV, is_recursive=True)
    enter_root(mount_point)
    set_mount_attributes("/", ATTR_READ_ONLY, is_recursive=False)


def _show_read_only(path: str, root: Path) -> None:
    target = root / path[1:]
    if os.path.islink(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(path))
    elif os.path.exists(path) and not target.exists():  # a prefix below /usr is there already
        _bind(path, target)
        set_mount_attributes(str(target), ATTR_READ_ONLY | ATTR_NO_SUID | ATTR_NO_DEV, is_recursive=True)


def _bind(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(source):
        target.mkdir()
    else:
        target.touch()
    mount(source, str(target), None, MS_BIND | MS_REC)


def _mount_fresh(kind: str, target: Path, options: str | None) -> None:
    target.mkdir()
    mount(kind, str(target), kind, MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
