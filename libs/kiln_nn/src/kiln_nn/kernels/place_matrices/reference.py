"""The same matrix by matrix, with torch's own copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kiln_nn.kernels.place_matrices import Placement


def place_matrices_reference_(
    placements: Sequence[Placement],
    block: torch.Tensor,
    block_item: int,
    slot: int,
    has_non_finite: torch.Tensor,
) -> None:
    """Arguments as the package's public function's."""
    for placement in placements:
        target = placement.targets_SRC[slot]
        if placement.source_item is None:
            target.zero_()
            continue
        first = placement.source_item - block_item
        target.copy_(block[first : first + target.numel()].view(target.shape))
        if not bool(target.isfinite().all()):
            has_non_finite.fill_(1)
