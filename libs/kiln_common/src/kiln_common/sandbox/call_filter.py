"""Which system calls the sandbox refuses: those that namespaces and limits do not reach.

Most keep memory that belongs to no process (and so escapes a limit on processes' memory), or speak
to parts of the kernel that know no namespaces. The program is classic BPF over `struct seccomp_data`
(Linux, Documentation/userspace-api/seccomp_filter.rst): call number at byte 0, architecture at 4,
arguments from 16, of which the low halves are looked at.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class _Architecture:
    audit_number: int
    refused: tuple[int, ...]
    mmap: int
    socket: int


# In order: memfd_create, memfd_secret, shmget, msgget, semget, io_uring_setup, userfaultfd, bpf, perf_event_open,
# keyctl, add_key, request_key, ptrace.
_ARCHITECTURES = {
    "x86_64": _Architecture(
        0xC000003E, (319, 447, 29, 68, 64, 425, 323, 321, 298, 250, 248, 249, 101), mmap=9, socket=41
    ),
    "aarch64": _Architecture(
        0xC00000B7, (279, 447, 194, 186, 190, 425, 282, 280, 241, 219, 217, 218, 117), mmap=222, socket=198
    ),
}

_LOAD, _AND = 0x20, 0x54
_JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST = 0x15, 0x35
_RETURN = 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000  # x86_64's second numbering of the same calls
_SHARED_ANONYMOUS = 0x01 | 0x20
_SOCKET_FAMILIES = (1, 2, 10)  # Unix, IPv4, IPv6: the last two end in the empty network namespace


def _instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, k)


def filter_program(machine: str) -> bytes:
    """The program for `machine` as `os.uname` names it.

    Raises:
        KeyError: the numbers of its system calls are not known here.
    """
    calls = _ARCHITECTURES[machine]
    refuse = _instruction(_RETURN, _REFUSE)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_IF_EQUAL, calls.audit_number, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_IF_AT_LEAST, _X32_BIT, if_false=1),
        refuse,
    ]
    for number in calls.refused:
        program += [_instruction(_JUMP_IF_EQUAL, number, if_false=1), refuse]
    program += [
        _instruction(_JUMP_IF_EQUAL, calls.mmap, if_false=4),
        _instruction(_LOAD, _ARGUMENTS + 3 * 8),
        _instruction(_AND, _SHARED_ANONYMOUS),
        _instruction(_JUMP_IF_EQUAL, _SHARED_ANONYMOUS, if_false=1),
        refuse,
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_IF_EQUAL, calls.socket, if_false=len(_SOCKET_FAMILIES) + 2),
        _instruction(_LOAD, _ARGUMENTS),
    ]
    for index, family in enumerate(_SOCKET_FAMILIES):
        program.append(_instruction(_JUMP_IF_EQUAL, family, if_true=len(_SOCKET_FAMILIES) - index))
    program += [refuse, _instruction(_RETURN, _ALLOW)]
    return b"".join(program)
