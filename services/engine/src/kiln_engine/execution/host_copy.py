"""Numbers on their way to the host while the device goes on."""

from __future__ import annotations

from typing import Any

import torch


class HostCopy:
    """A copy of a tensor as it is at this point of the stream; `wait` sleeps until it has arrived."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host = pinned.copy_(tensor, non_blocking=True)
            # Sleeps in `wait` instead of spinning: the device has its next step already.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()
        else:
            self._host = tensor.clone()

    def wait(self) -> Any:
        """The numbers as nested lists."""
        return self.tensor().tolist()

    def tensor(self) -> torch.Tensor:
        """The numbers on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
