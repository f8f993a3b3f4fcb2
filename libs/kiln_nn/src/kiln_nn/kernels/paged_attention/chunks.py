"""The prompt chunks of a step as attention sees them.

Legend: `N` chunks, `B` tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Query tokens that the kernel takes at a time.
TILE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class PromptChunks:
    """Integer device tensors, the same for all layers of a step.

    Chunk `n` is the tokens `cu_seqlens[n]` to `cu_seqlens[n + 1]`, the last of its sequence's
    `context_lengths[n]`, whose pages are in line `table_rows[n]` of the page table; an empty one pads
    the list. The tiles of `TILE_TOKENS` tokens are named by chunk and offset in it; chunk -1 pads.
    """

    cu_seqlens_N1: torch.Tensor
    context_lengths_N: torch.Tensor
    table_rows_N: torch.Tensor
    tile_chunks_B: torch.Tensor
    tile_starts_B: torch.Tensor
