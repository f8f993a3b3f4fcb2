"""The CUDA driver through ctypes: the few calls that weight sharing needs, and their failures.

Both transports use this one binding. `cuda-bindings` would be another that only comes with CUDA
builds of torch; tests compare the structures with NVIDIA's header.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from kiln_nn.errors import OutOfDeviceMemory, ShareUnsupported

# CUdevice_attribute
VIRTUAL_MEMORY_SUPPORTED = 102
POSIX_DESCRIPTORS_SUPPORTED = 103
MPS_ENABLED = 133

LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2


@cache
def driver() -> Any:
    """The driver's library.

    Raises:
        ShareUnsupported: there is none on this machine.
    """
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ShareUnsupported(f"{LIBRARY} is not there: no NVIDIA driver") from error


def call(name: str, *arguments: object) -> None:
    """Call a driver function; every argument is a ctypes object, so that its width is known.

    Raises:
        OutOfDeviceMemory: the GPU has no room.
        ShareUnsupported: any other failure, with the driver's name for it.
    """
    code = getattr(driver(), name)(*arguments)
    if code == _OUT_OF_MEMORY:
        raise OutOfDeviceMemory(f"{name} found no free device memory")
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        raise ShareUnsupported(f"{name} failed with {(text.value or b'unknown').decode()} ({code})")


def make_context_current(device: torch.device) -> None:
    """Driver calls act on the thread's current context; any runtime call that needs one sets it."""
    torch.cuda.set_device(device)
    torch.cuda.mem_get_info(device)


def runs_under_mps(device: torch.device) -> bool:
    """Whether this process shares the GPU through an MPS server."""
    make_context_current(device)
    return device_attribute(device, MPS_ENABLED) == 1


def device_attribute(device: torch.device, attribute: int) -> int:
    """One of the device's numbers, as the driver counts them."""
    value = ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(device.index))
    return value.value
