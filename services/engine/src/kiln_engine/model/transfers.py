"""From the host to the device without waiting for the steps that the device is working on."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(
    numbers: Sequence[object] | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers (also nested) as a tensor on the device.

    A copy from ordinary memory would wait until the device has come to it; pinned memory is kept by
    torch's allocator until the copy is done.
    """
    host = numbers if isinstance(numbers, torch.Tensor) else torch.tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def copy_to(target: torch.Tensor, host: torch.Tensor) -> None:
    """Overwrite a tensor on the device, once the steps launched before have read it."""
    source = host if target.device.type == "cpu" else host.pin_memory()
    target.copy_(source, non_blocking=True)
