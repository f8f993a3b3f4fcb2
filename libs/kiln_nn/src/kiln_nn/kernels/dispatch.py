"""Which implementation of an operation runs, and what the device offers to it.

Triton kernels serve tensors on the current CUDA device that need no gradient; everything else
goes to the references. `KILN_KERNELS=reference` in the environment forces the references.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

_OLDEST_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies


@dataclass(frozen=True)
class DeviceLimits:
    """The numbers of a GPU that a kernel's configuration depends on."""

    num_multiprocessors: int
    shared_memory_bytes: int  # that one program may use


# By compute capability, from the CUDA programming guide's table of technical specifications.
_SHARED_MEMORY_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_MEMORY_KIB = 99
_WITHOUT_GPU = DeviceLimits(num_multiprocessors=132, shared_memory_bytes=_LEAST_SHARED_MEMORY_KIB * 1024)


@cache
def has_triton() -> bool:
    """Whether Triton can be imported and the environment does not forbid it."""
    if os.environ.get("KILN_KERNELS") == "reference":
        return False
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU, which computes bf16 wrongly.

    There, kernels convert what they load to float32 before anything else.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _is_new_enough(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= _OLDEST_CAPABILITY


def takes_triton(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels may compute with these tensors: where they are, not what shape."""
    device = tensors[0].device
    if device.type != "cuda" or not has_triton():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(tensor.device != device for tensor in tensors[1:]):
        return False
    return device.index == torch.cuda.current_device() and _is_new_enough(device.index)


@cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device; elsewhere (interpreter, compile checks) those of a common one."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    kib = _SHARED_MEMORY_KIB.get(capability, _LEAST_SHARED_MEMORY_KIB)
    return DeviceLimits(properties.multi_processor_count, kib * 1024)
