"""Weight memory on a GPU behind a legacy handle: one plain driver allocation, shared by 64 bytes.

It lies outside torch's caching allocator, whose expandable segments cannot be exported this way.
The handle gives a reader no write protection: the arena's checksum is the proof there.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from kiln_nn.errors import OutOfDeviceMemory, ShareUnsupported
from kiln_nn.weights.cuda_driver import call, driver, make_context_current
from kiln_nn.weights.device_region import DeviceRegion

IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
# The driver packs small allocations into shared 2 MiB blocks, and an opened handle then shows
# the block and not the allocation; whole blocks are always their own.
_BLOCK_BYTES = 2 << 20


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


class CudaMemory:
    """One device allocation of at least `nbytes` that this process owns.

    Raises:
        OutOfDeviceMemory: it does not fit.
    """

    transport: Final = "cuda_ipc"
    fd: Final = -1

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.device = device
        make_context_current(device)
        address = ctypes.c_uint64()
        padded_nbytes = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
        try:
            call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(padded_nbytes))
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"the weights need {padded_nbytes} bytes on {device}, which are not free"
            ) from error
        region = DeviceRegion(address.value, nbytes, device, _free)
        self._bytes_u8: torch.Tensor | None = region.as_tensor()
        self._bytes_u8.zero_()  # so that the gaps between tensors have one checksum everywhere

    def writable_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes] to load into."""
        assert self._bytes_u8 is not None, "the device memory was closed"
        return self._bytes_u8

    def seal(self) -> None:
        """Wait until what was copied has arrived; there is no protection to switch on."""
        torch.cuda.synchronize(self.device)

    def readonly_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes]; read-only by convention."""
        return self.writable_u8()

    def ipc_handle(self) -> bytes:
        """The 64 bytes with which another process opens this allocation."""
        make_context_current(self.device)
        handle = _IpcHandle()
        call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.writable_u8().data_ptr()))
        return bytes(handle)

    def close(self) -> None:
        """Let go; the memory is freed when the last view has gone."""
        self._bytes_u8 = None


def open_ipc(handle: bytes, nbytes: int, device: torch.device) -> torch.Tensor:
    """Map another process's allocation as a flat uint8 tensor; unmapped when its last view goes.

    Raises:
        ShareUnsupported: the driver refuses (another machine, another GPU, or this very process).
    """
    if len(handle) != IPC_HANDLE_BYTES:
        raise ShareUnsupported(f"a CUDA IPC handle has {IPC_HANDLE_BYTES} bytes, got {len(handle)}")
    make_context_current(device)
    # The handle goes by value: ctypes must know the type to copy 64 bytes onto the stack.
    driver().cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint)
    address = ctypes.c_uint64()
    call(
        "cuIpcOpenMemHandle_v2",
        ctypes.byref(address),
        _IpcHandle.from_buffer_copy(handle),
        ctypes.c_uint(_LAZY_PEER_ACCESS),
    )
    return DeviceRegion(address.value, nbytes, device, _close_ipc).as_tensor()


def _free(address: int) -> None:
    driver().cuMemFree_v2(ctypes.c_uint64(address))


def _close_ipc(address: int) -> None:
    driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
