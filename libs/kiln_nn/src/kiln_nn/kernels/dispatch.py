"""Which implementation of an operation runs, and what the device offers to it.

Triton kernels serve tensors on the current CUDA device; where gradients are needed, only those kernels
that bring their own backward pass. Everything else goes to the references.
`KILN_KERNELS=reference` in the environment forces them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cache

import torch

# Operations whose backward kernels have passed their tests on a GPU, which is more than compiling:
# compilers have got such kernels wrong before. The others' gradients come from the references.
PROVEN_BACKWARD = frozenset(
    {"delta_train", "delta_train_heads", "logprobs", "qk_norm_rope", "rms_norm", "swiglu", "varlen_attention"}
)
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
def why_no_triton() -> str | None:
    """What stands against using Triton in this process; None if nothing does.

    Triton builds the launcher of a kernel with a C compiler when it first meets the kernel.
    """
    if os.environ.get("KILN_KERNELS") == "reference":
        return "KILN_KERNELS=reference is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or is_interpreted()):
        return "there is no C compiler (gcc, clang, or the one that CC names)"
    return None


def has_triton() -> bool:
    """Whether Triton's kernels can be built and the environment does not forbid it."""
    return why_no_triton() is None


def why_no_kernels(device: torch.device) -> str | None:
    """What stands against running the kernels on a CUDA device; None if nothing does."""
    if (reason := why_no_triton()) is not None:
        return reason
    if not _is_new_enough(device.index or 0):
        major, minor = torch.cuda.get_device_capability(device)
        oldest = ".".join(map(str, _OLDEST_CAPABILITY))
        return f"the GPU has compute capability {major}.{minor}, the kernels need {oldest} or newer"
    return None


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
    return not needs_gradients(*tensors) and _are_on_gpu(*tensors)


def needs_gradients(*tensors: torch.Tensor) -> bool:
    """Whether autograd will ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def may_train_on_gpu(operation: str, *tensors: torch.Tensor) -> bool:
    """The same for an operation whose kernels have a backward pass of their own; see `PROVEN_BACKWARD`."""
    return operation in PROVEN_BACKWARD and _are_on_gpu(*tensors)


def _are_on_gpu(*tensors: torch.Tensor) -> bool:
    device = tensors[0].device
    if device.type != "cuda" or not has_triton():
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
