"""The prefill chunks of a step as attention sees them, and their division into query tiles.

Legend: `N` chunks, `B` query tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_nn.kernels.checks import ShapeMismatch, check_shape

NO_CHUNK = -1
# Rows of a tile, one for each token and query head of a kv head: few for the drafts of a decode
# pass, many where arithmetic is the limit.
TILE_ROWS = (16, 64, 128)


@dataclass(frozen=True, eq=False)
class AttentionChunks:
    """Chunks of several sequences as integer device tensors, the same for all layers of a step.

    Chunk `n` is the tokens `cu_seqlens[n]` to `cu_seqlens[n + 1]`, the last of the
    `context_lengths[n]` tokens of its sequence; an empty chunk pads the list. A tile is
    `tile_tokens` tokens of chunk `tile_chunks[b]` from its token `tile_starts[b]` on; a chunk of
    NO_CHUNK pads. Tiles together cover every chunk once, the longest contexts best first.

    Sizes are capacities: what a CUDA graph captured may be replayed with other contents.
    """

    cu_seqlens_N1: torch.Tensor
    context_lengths_N: torch.Tensor
    tile_chunks_B: torch.Tensor
    tile_starts_B: torch.Tensor
    tile_tokens: int

    @property
    def num_chunks(self) -> int:
        return self.context_lengths_N.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.tile_chunks_B.shape[0]

    def check(self) -> None:
        """Compare the sizes of the lists.

        Raises:
            ShapeMismatch: one of them does not fit.
        """
        check_shape("context_lengths", self.context_lengths_N, (None,))
        check_shape("cu_seqlens", self.cu_seqlens_N1, (self.num_chunks + 1,))
        check_shape("tile_chunks", self.tile_chunks_B, (None,))
        check_shape("tile_starts", self.tile_starts_B, (self.num_tiles,))
        if self.tile_tokens < 1 or self.tile_tokens & (self.tile_tokens - 1):
            raise ShapeMismatch("tile_tokens", (self.tile_tokens,), ("a power of two",))


def choose_tile_tokens(num_new_tokens: Sequence[int], num_grouped_heads: int = 4) -> int:
    """Tokens of a tile for chunks of these lengths: small ones where the chunks are.

    `num_grouped_heads` is the number of query heads that share a kv head.
    """
    rows_per_token = 1 << (num_grouped_heads - 1).bit_length()
    if rows_per_token * max(num_new_tokens, default=0) <= TILE_ROWS[0]:
        rows = TILE_ROWS[0]
    else:
        is_short = rows_per_token * sum(num_new_tokens) <= TILE_ROWS[1] * len(num_new_tokens)
        rows = TILE_ROWS[1 if is_short else 2]
    return max(1, rows // rows_per_token)


def most_tiles(num_chunks: int, num_tokens: int, tile_tokens: int) -> int:
    """Tiles that are enough for any division of `num_tokens` tokens into `num_chunks` chunks."""
    return num_tokens // tile_tokens + num_chunks


def chunk_tiles(
    num_new_tokens: Sequence[int],
    context_lengths: Sequence[int],
    tile_tokens: int,
    capacity: int | None = None,
) -> tuple[list[int], list[int]]:
    """Contents of `tile_chunks` and `tile_starts`, heaviest tile first, padded to `capacity`.

    Raises:
        ShapeMismatch: more tiles than the capacity, or a chunk longer than its context.
    """
    tiles = []
    for chunk, (num_new, context) in enumerate(zip(num_new_tokens, context_lengths, strict=True)):
        if num_new > context:
            raise ShapeMismatch("context", (context,), (f"{num_new} or more",))
        past = context - num_new
        tiles += [(-(past + start), chunk, start) for start in range(0, num_new, tile_tokens)]
    tiles.sort()
    padding = 0 if capacity is None else capacity - len(tiles)
    if padding < 0:
        raise ShapeMismatch("tiles", (len(tiles),), (f"at most {capacity}",))
    return [chunk for _, chunk, _ in tiles] + [NO_CHUNK] * padding, [s for *_, s in tiles] + [0] * padding
