"""Places any number of matrices in one launch: a program takes one tile of one matrix.

Takes sources and targets in float32, bfloat16 and float16, targets of any strides and fewer than
2**31 numbers each. Copies exactly, but for the rounding to the target's format.

Reads run along the source, writes go where the target's strides say: a transposed target (B of an
adapter) is written in pieces of one number, which the cache joins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dispatch import is_interpreted

if TYPE_CHECKING:
    from kiln_nn.kernels.place_matrices import PlacementTable

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def place_matrices_(
    table: PlacementTable,
    start: int,
    end: int,
    block: torch.Tensor,
    block_item: int,
    slot: int,
    has_non_finite: torch.Tensor,
) -> None:
    """Arguments as the package's public function's; one launch."""
    from kiln_nn.kernels.place_matrices import TILE_ITEMS

    first, behind = table.tile_range(start, end)
    if first == behind:
        return
    target = _TYPES[table.placements[0].targets_SRC.dtype]
    place_kernel[(behind - first,)](
        block,
        table.tiles_BW[first:],
        has_non_finite,
        block_item,
        slot,
        TARGET=target,
        ITEMS=TILE_ITEMS,
        INTERPRETED=is_interpreted(),
        num_warps=8,
    )


@triton.jit(do_not_specialize=["block_item", "slot"])
def place_kernel(
    block,
    tiles,
    has_non_finite,
    block_item,
    slot,
    TARGET: tl.constexpr,
    ITEMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * 8
    address = tl.load(tile)
    slot_stride, row_stride, column_stride = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    source_item, num_columns = tl.load(tile + 4), tl.load(tile + 5).to(tl.int32)
    first, end = tl.load(tile + 6).to(tl.int32), tl.load(tile + 7).to(tl.int32)
    index = first + tl.arange(0, ITEMS)
    is_here = index < end
    has_source = source_item >= 0
    values = tl.load(block + (source_item - block_item) + index, is_here & has_source, other=0.0)
    if INTERPRETED:
        values = values.to(tl.float32)
    values = values.to(TARGET)
    row, column = index // num_columns, index % num_columns
    place = slot * slot_stride + row * row_stride + column * column_stride
    tl.store(address.to(tl.pointer_type(TARGET)) + place, values, is_here)
    wide = values.to(tl.float32)
    is_bad = tl.max((wide - wide != 0.0).to(tl.int32), 0)
    tl.store(has_non_finite, 1, is_bad > 0)
