"""Numbers on their way to the host while the device goes on."""

from __future__ import annotations

from typing import Any

import torch


class HostCopy:
    """A copy of a tensor as it is at this point of the stream; `wait` waits until it has arrived.

    It sleeps, which lets others have the processor, but takes tens of microseconds to wake up. If it is
    urgent, because the device has nothing to do before the host goes on, it spins.
    """

    def __init__(self, tensor: torch.Tensor, *, is_urgent: bool = False) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host = pinned.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=not is_urgent)
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
