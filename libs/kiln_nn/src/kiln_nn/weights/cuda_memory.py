"""Weight memory on a GPU: one plain driver allocation, outside torch's caching allocator.

torch's expandable segments cannot be exported the legacy way, hence the allocation of our own.
The legacy handle gives a reader no write protection: the arena's checksum is the proof there.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch

from kiln_nn.errors import OutOfDeviceMemory, ShareUnsupported

IPC_HANDLE_BYTES = 64
_OUT_OF_MEMORY = 2
_LAZY_PEER_ACCESS = 1
# The driver packs small allocations into shared 2 MiB blocks, and an opened handle then shows
# the block and not the allocation; whole blocks are always their own.
_BLOCK_BYTES = 2 << 20


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


class CudaMemory:
    """One device allocation of at least `nbytes` that this process owns."""

    transport = "cuda_ipc"

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.device = device
        _make_context_current(device)
        address = ctypes.c_uint64()
        padded_nbytes = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
        code = _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(padded_nbytes))
        if code == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"the weights need {padded_nbytes} bytes on {device}, which are not free")
        _check(code, "cuMemAlloc")
        self._region: _DeviceRegion | None = _DeviceRegion(address.value, nbytes, device, is_owner=True)
        self._bytes_u8: torch.Tensor | None = self._region.as_tensor()
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
        assert self._region is not None, "the device memory was closed"
        _make_context_current(self.device)
        handle = _IpcHandle()
        _check(
            _driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(self._region.address)),
            "cuIpcGetMemHandle",
        )
        return bytes(handle)

    def close(self) -> None:
        """Let go; the memory is freed when the last view has gone."""
        self._bytes_u8 = None
        self._region = None


def open_ipc(handle: bytes, nbytes: int, device: torch.device) -> torch.Tensor:
    """Map another process's allocation as a flat uint8 tensor; unmapped when its last view goes.

    Raises:
        ShareUnsupported: the driver refuses (another machine, another GPU, or this very process).
    """
    if len(handle) != IPC_HANDLE_BYTES:
        raise ShareUnsupported(f"a CUDA IPC handle has {IPC_HANDLE_BYTES} bytes, got {len(handle)}")
    _make_context_current(device)
    driver = _driver()
    # The handle goes by value: ctypes must know the type to copy 64 bytes onto the stack.
    driver.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint)
    address = ctypes.c_uint64()
    opened = _IpcHandle.from_buffer_copy(handle)
    _check(
        driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), opened, _LAZY_PEER_ACCESS), "cuIpcOpenMemHandle"
    )
    return _DeviceRegion(address.value, nbytes, device, is_owner=False).as_tensor()


def device_id(device: torch.device) -> str:
    """The GPU's UUID, the same in every process whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def find_device(wanted_id: str) -> torch.device:
    """The visible device with that UUID.

    Raises:
        ShareUnsupported: this process does not see that GPU.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(num_devices):
        device = torch.device("cuda", index)
        if device_id(device) == wanted_id:
            return device
    raise ShareUnsupported(
        f"the weights are on {wanted_id}, which is not among this process's {num_devices} GPUs"
    )


class _DeviceRegion:
    """A device address that torch can wrap without copying; freed or unmapped when collected."""

    def __init__(self, address: int, nbytes: int, device: torch.device, *, is_owner: bool) -> None:
        self.address = address
        self._device = device
        self._is_owner = is_owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }

    def as_tensor(self) -> torch.Tensor:
        """Flat uint8 over the region; torch holds a reference to this object."""
        tensor = torch.as_tensor(self, device=self._device)
        if tensor.data_ptr() != self.address:
            raise ShareUnsupported("torch copied the weight memory instead of wrapping it")
        return tensor

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # the driver may be gone already, and the process's end frees all
        # Kernels may still be reading; this also makes the context current on a collecting thread.
        torch.cuda.synchronize(self._device)
        release = _driver().cuMemFree_v2 if self._is_owner else _driver().cuIpcCloseMemHandle
        release(ctypes.c_uint64(self.address))


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ShareUnsupported("libcuda.so.1 is not there: no NVIDIA driver") from error


def _make_context_current(device: torch.device) -> None:
    """Driver calls act on the thread's current context; any runtime call that needs one sets it."""
    torch.cuda.set_device(device)
    torch.cuda.mem_get_info(device)


def _check(code: int, call: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise ShareUnsupported(f"{call} failed with {(name.value or b'unknown').decode()} ({code})")
