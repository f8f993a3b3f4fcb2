"""Many matrices out of one block of bytes, each to its own place, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.place_matrices.reference import place_matrices_reference_

__all__ = ["TILE_ITEMS", "Placement", "PlacementTable", "place_matrices_"]

TILE_ITEMS = 4096
_WORDS = 8


@dataclass(frozen=True)
class Placement:
    """One matrix's way: `targets_SRC[slot]` is where it goes, whatever the strides.

    `source_item` is its first number's index in the block, where it lies row by row; None where
    there is nothing and zeros go to the target.
    """

    source_item: int | None
    targets_SRC: torch.Tensor


class PlacementTable:
    """Placements cut into tiles of at most TILE_ITEMS numbers, on the device of the targets.

    A tile is eight int64: address of its matrix in slot 0; items between two slots, rows, columns of
    the target; first item of the source or -1; columns; first number of the tile and end of the
    matrix. Keeps the targets alive.
    """

    def __init__(self, placements: Sequence[Placement], device: torch.device) -> None:
        self.placements = list(placements)
        tiles, self._first_tiles = _tiles(self.placements)
        self.tiles_BW = torch.from_numpy(tiles).to(device)

    def tile_range(self, start: int, end: int) -> tuple[int, int]:
        """The tiles of placements `start` to `end`."""
        return self._first_tiles[start], self._first_tiles[end]


def place_matrices_(
    table: PlacementTable,
    start: int,
    end: int,
    block: torch.Tensor,
    block_item: int,
    slot: int,
    has_non_finite: torch.Tensor,
) -> None:
    """Write placements `start` to `end` of the table into `slot`, converting to the targets' format.

    `block` is flat and holds the source from item `block_item` on. `has_non_finite` (int32, one
    number) becomes 1 when a number is NaN or infinite in the target's format. On the Triton path
    there is no host synchronisation.
    """
    if takes_triton(block, has_non_finite, table.tiles_BW):
        from kiln_nn.kernels.place_matrices import triton

        triton.place_matrices_(table, start, end, block, block_item, slot, has_non_finite)
    else:
        place_matrices_reference_(table.placements[start:end], block, block_item, slot, has_non_finite)


def _tiles(placements: Sequence[Placement]) -> tuple[np.ndarray, list[int]]:
    """`[tiles, words]`, and for each placement (and behind the last) its first tile."""
    sizes = np.array([p.targets_SRC[0].numel() for p in placements], np.int64)
    counts = -(-sizes // TILE_ITEMS)
    first_tiles = np.concatenate([[0], np.cumsum(counts)])
    rows = np.array(
        [
            (
                p.targets_SRC.data_ptr(),
                *p.targets_SRC.stride(),
                -1 if p.source_item is None else p.source_item,
                p.targets_SRC.shape[2],
                0,
                p.targets_SRC[0].numel(),
            )
            for p in placements
        ],
        np.int64,
    ).reshape(-1, _WORDS)
    tiles = np.repeat(rows, counts, axis=0)
    tiles[:, 6] = (np.arange(len(tiles)) - np.repeat(first_tiles[:-1], counts)) * TILE_ITEMS
    return tiles, [int(first) for first in first_tiles]
