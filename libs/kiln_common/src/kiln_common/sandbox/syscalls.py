"""The Linux calls the sandbox needs that Python 3.11 does not offer; each raises OSError on failure."""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8

ATTR_READ_ONLY = 1
ATTR_NO_SUID = 2
ATTR_NO_DEV = 4

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_MNT_DETACH = 2
_AT_RECURSIVE = 0x8000
_NR_MOUNT_SETATTR = 442  # the same on every architecture
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "making namespaces")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mounting {target}")


def set_mount_attributes(target: str, attributes: int, *, is_recursive: bool) -> None:
    """Add `attributes` to the mount at `target`, and to all mounts below it."""
    flags = _AT_RECURSIVE if is_recursive else 0
    words = struct.pack("QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(_NR_MOUNT_SETATTR, -1, target.encode(), flags, words, len(words))
    _check(result, f"restricting the mount {target}")


def enter_root(folder: str) -> None:
    """Make the mount at `folder` the root, and let go of the old one for good."""
    os.chdir(folder)
    _check(_libc.syscall(_NR_PIVOT_ROOT[os.uname().machine], b".", b"."), "changing the root")
    _check(_libc.umount2(b".", _MNT_DETACH), "leaving the old root")
    os.chdir("/")


def die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "tying the process to its parent")


def set_dumpable(is_dumpable: bool) -> None:
    """Whether processes of the same user may look into this one."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(is_dumpable), 0, 0, 0), "setting dumpable")


def drop_capabilities() -> None:
    """Give up every capability, and any way to gain one by running a program."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "setting no_new_privs")
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("6I", *[0] * 6)), "dropping capabilities")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(instructions: bytes) -> None:
    """Filter this process's system calls, and its children's, by a classic BPF program."""
    program = _Program(len(instructions) // 8, instructions)
    result = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    _check(result, "filtering system calls")
