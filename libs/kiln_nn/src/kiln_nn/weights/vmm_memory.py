"""Weight memory on a GPU behind a descriptor: filled once, and from then on mapped read-only.

Physical memory comes from the driver's virtual memory management and leaves the process as a POSIX
descriptor. Owner and readers map it with read access alone: a kernel that writes to it dies of an
illegal access in the process that launched it, and the bytes stay as they are.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial
from typing import Final

import torch

from kiln_nn.errors import KilnNnError, OutOfDeviceMemory, ShareUnsupported
from kiln_nn.weights import cuda_driver
from kiln_nn.weights.cuda_driver import call, driver, make_context_current
from kiln_nn.weights.device_region import DeviceRegion

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: device memory that stays where it is
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_POSIX_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_*
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    )


class _AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class VmmMemory:
    """One physical allocation of at least `nbytes`; write through `writable_u8`, `seal`, then read.

    Raises:
        OutOfDeviceMemory: it does not fit.
        ShareUnsupported: the driver refuses; `why_not` would have said so.
    """

    transport: Final = "cuda_vmm"

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.device = device
        self.fd = -1
        make_context_current(device)
        self._handle: ctypes.c_uint64 | None = _create(nbytes, device)
        try:
            self._bytes_u8: torch.Tensor | None = _map(self._handle, nbytes, device, _READ_WRITE)
        except BaseException:
            self.close()
            raise
        self._bytes_u8.zero_()  # so that the gaps between tensors have one checksum everywhere

    def writable_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes] to load into; every view of it should be gone before `seal`."""
        assert self._handle is not None, "the device memory was sealed or closed"
        return self.readonly_u8()

    def seal(self) -> None:
        """Trade the writable mapping for a read-only one, and make the descriptor for readers.

        The writable mapping lasts as long as views of it do.
        """
        assert self._handle is not None, "the device memory was sealed or closed"
        make_context_current(self.device)
        torch.cuda.synchronize(self.device)
        self._bytes_u8 = None
        self._bytes_u8 = _map(self._handle, self.nbytes, self.device, _READ)
        self.fd = _export(self._handle)
        self._let_go_of_handle()  # mapping and descriptor hold the memory now

    def readonly_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes], after `seal` protected by the GPU itself."""
        assert self._bytes_u8 is not None, "the device memory was closed"
        return self._bytes_u8

    def close(self) -> None:
        """Let go; memory goes when the last view in any process has gone."""
        self._bytes_u8 = None
        self._let_go_of_handle()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _let_go_of_handle(self) -> None:
        if self._handle is not None:
            driver().cuMemRelease(self._handle)
            self._handle = None


def open_vmm(fd: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Map another process's allocation, for reading alone, as a flat uint8 tensor.

    It is unmapped when its last view goes; the descriptor is not needed any more.

    Raises:
        ShareUnsupported: the driver refuses the descriptor.
    """
    make_context_current(device)
    handle = ctypes.c_uint64()
    call(
        "cuMemImportFromShareableHandle",
        ctypes.byref(handle),
        ctypes.c_void_p(fd),
        ctypes.c_int(_POSIX_DESCRIPTOR),
    )
    try:
        return _map(handle, nbytes, device, _READ)
    finally:
        driver().cuMemRelease(handle)


def why_not(device: torch.device) -> str | None:
    """Why weights on this device cannot be shared by descriptor; None where they can. Tries it."""
    make_context_current(device)
    try:
        if not cuda_driver.device_attribute(device, cuda_driver.VIRTUAL_MEMORY_SUPPORTED):
            return "the GPU has no virtual memory management"
        if not cuda_driver.device_attribute(device, cuda_driver.POSIX_DESCRIPTORS_SUPPORTED):
            return "the driver exports no memory as a POSIX descriptor"
        memory = VmmMemory(1, device)
        try:
            memory.seal()
        finally:
            memory.close()
    except KilnNnError as error:
        return str(error)
    return None


def _property(device: torch.device) -> _AllocationProp:
    return _AllocationProp(
        type=_PINNED,
        requested_handle_types=_POSIX_DESCRIPTOR,
        location=_Location(_ON_DEVICE, device.index),
    )


def _padded(nbytes: int, device: torch.device) -> ctypes.c_size_t:
    """Memory is created and mapped in whole granules, the same for both sides of one device."""
    granule = ctypes.c_size_t()
    call(
        "cuMemGetAllocationGranularity",
        ctypes.byref(granule),
        ctypes.byref(_property(device)),
        ctypes.c_int(_MINIMUM),
    )
    return ctypes.c_size_t(-(-nbytes // granule.value) * granule.value)


def _create(nbytes: int, device: torch.device) -> ctypes.c_uint64:
    handle, size = ctypes.c_uint64(), _padded(nbytes, device)
    try:
        call(
            "cuMemCreate",
            ctypes.byref(handle),
            size,
            ctypes.byref(_property(device)),
            ctypes.c_ulonglong(0),
        )
    except OutOfDeviceMemory as error:
        raise OutOfDeviceMemory(
            f"the weights need {size.value} bytes on {device}, which are not free"
        ) from error
    return handle


def _map(handle: ctypes.c_uint64, nbytes: int, device: torch.device, access: int) -> torch.Tensor:
    """Flat uint8 [nbytes] over a mapping of its own with that access for this device."""
    size = _padded(nbytes, device)
    address, none = ctypes.c_uint64(), ctypes.c_ulonglong(0)
    call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), ctypes.c_uint64(0), none)
    try:
        call("cuMemMap", address, size, ctypes.c_size_t(0), handle, none)
        try:
            rights = _AccessDesc(_Location(_ON_DEVICE, device.index), access)
            call("cuMemSetAccess", address, size, ctypes.byref(rights), ctypes.c_size_t(1))
        except KilnNnError:
            driver().cuMemUnmap(address, size)
            raise
    except KilnNnError:
        driver().cuMemAddressFree(address, size)
        raise
    return DeviceRegion(address.value, nbytes, device, partial(_unmap, size.value)).as_tensor()


def _unmap(size: int, address: int) -> None:
    driver().cuMemUnmap(ctypes.c_uint64(address), ctypes.c_size_t(size))
    driver().cuMemAddressFree(ctypes.c_uint64(address), ctypes.c_size_t(size))


def _export(handle: ctypes.c_uint64) -> int:
    fd = ctypes.c_int(-1)
    call(
        "cuMemExportToShareableHandle",
        ctypes.byref(fd),
        handle,
        ctypes.c_int(_POSIX_DESCRIPTOR),
        ctypes.c_ulonglong(0),
    )
    if fd.value < 0:
        raise ShareUnsupported("cuMemExportToShareableHandle gave no descriptor")
    os.set_inheritable(fd.value, False)
    return fd.value
