"""Device memory that torch did not allocate, as a torch tensor; and how a GPU is known to all processes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from kiln_nn.errors import ShareUnsupported


class DeviceRegion:
    """A device address that torch can wrap without copying.

    `release(address)` frees or unmaps it when the last tensor over it has gone.
    """

    def __init__(
        self, address: int, nbytes: int, device: torch.device, release: Callable[[int], None]
    ) -> None:
        self.address = address
        self._device = device
        self._release = release
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
        self._release(self.address)


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
