"""Weight memory on the CPU: a memfd that is filled once, sealed, and from then on only read.

After sealing, no process can map it writable, grow it or shrink it, the engine included: a
stray write faults instead of changing the weights.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any, Final

import numpy as np
import torch

from kiln_nn.errors import ShareRefused, ShareUnsupported

PROTECTING_SEALS = (
    getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0) | getattr(fcntl, "F_SEAL_WRITE", 0)
)


class HostMemory:
    """One memfd of `nbytes`; write through `writable_u8`, call `seal`, then read `readonly_u8`."""

    transport: Final = "memfd"

    def __init__(self, nbytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise ShareUnsupported("this platform has no memfd")
        self.nbytes = nbytes
        self.fd = os.memfd_create("kiln-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        self._mapping: mmap.mmap | None = None
        self._readonly_u8: torch.Tensor | None = None

    def writable_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes] to load into; every view of it must be gone before `seal`."""
        self._mapping = mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def seal(self) -> None:
        """Unmap the only writable mapping and make the bytes immutable for everyone."""
        if self._mapping is not None:
            self._mapping.close()  # raises BufferError if a writable view is still alive
            self._mapping = None
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, PROTECTING_SEALS | fcntl.F_SEAL_SEAL)

    def readonly_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes] over a PROT_READ mapping; a write through it kills the writer."""
        if self._readonly_u8 is None:
            self._readonly_u8 = map_readonly(self.fd, self.nbytes)
        return self._readonly_u8

    def close(self) -> None:
        """Let go of the descriptor; memory goes when the last view in any process has gone."""
        self._readonly_u8 = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_readonly(fd: int, nbytes: int) -> torch.Tensor:
    """Map a memfd PROT_READ as a flat uint8 tensor that keeps the mapping alive."""
    return readonly_u8(mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ))


def readonly_u8(buffer: Any) -> torch.Tensor:
    """A flat uint8 tensor over bytes that must not be written, which it keeps alive.

    torch has no read-only tensors and warns about read-only buffers, so the address is handed
    over instead: the page protection of a mapping, not a flag, is what refuses writes.
    """
    bytes_u8 = np.frombuffer(buffer, dtype=np.uint8)
    if not len(bytes_u8):
        return torch.empty(0, dtype=torch.uint8)
    region_type: Any = type("_Region", (ctypes.c_uint8 * len(bytes_u8),), {})
    region = region_type.from_address(bytes_u8.ctypes.data)
    region.owner = bytes_u8
    return torch.frombuffer(region, dtype=torch.uint8)


def check_sealed(fd: int, nbytes: int) -> None:
    """Refuse a descriptor whose bytes could still change or vanish under a reader.

    Raises:
        ShareRefused: it is not a memfd sealed against writing and resizing, or it is too short.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ShareRefused("the descriptor that came with the weights is not a memfd") from error
    if seals & PROTECTING_SEALS != PROTECTING_SEALS:
        raise ShareRefused("the shared weights are not sealed against writing")
    if (size := os.fstat(fd).st_size) < nbytes:
        raise ShareRefused(f"the shared weights have {size} bytes, the manifest says {nbytes}")
