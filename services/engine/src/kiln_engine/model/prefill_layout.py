"""Where the prefill chunks of a step find and leave what they remember.

All numbers of a step's chunks are one flat list with a section for each purpose. With a capacity
the sections have the same places in every step, so that a captured graph finds them; chunks, tokens
and tiles behind the last one are empty.

Legend: `T` tokens, `N` chunks, `P` pages of all chunks, `B` tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kiln_engine.domain.plan import PrefillChunk
from kiln_engine.model.store_shape import StoreShape
from kiln_nn.kernels.delta_decode import NO_SLOT
from kiln_nn.kernels.delta_prefill import TILE_TOKENS as DELTA_TILE_TOKENS
from kiln_nn.kernels.delta_prefill import DeltaChunks
from kiln_nn.kernels.paged_attention import TILE_TOKENS as ATTENTION_TILE_TOKENS
from kiln_nn.kernels.paged_attention import PromptChunks

_NO_TILE = -1


@dataclass(frozen=True)
class PrefillCapacity:
    """Most tokens and chunks of a step's prefill, as a captured graph counts them."""

    num_tokens: int
    num_chunks: int

    def num_tiles(self, tile_tokens: int) -> int:
        """Tiles of at most `tile_tokens` tokens of one chunk each."""
        return -(-self.num_tokens // tile_tokens) + self.num_chunks


@dataclass(frozen=True)
class PrefillNumbers:
    """The numbers of all sections, one after the other, and the sections' lengths."""

    flat: np.ndarray
    section_sizes: tuple[int, ...]
    # Of the chunks, for references that work on the host; None where a graph decides.
    cu_seqlens: tuple[int, ...] | None
    context_lengths: tuple[int, ...] | None


@dataclass(frozen=True)
class PrefillLayout:
    """Views of one flat int64 tensor on the device; token numbers count from the first chunk's first."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    # Where each token's key and value go; -1 for padding.
    token_slots_T: torch.Tensor
    # The last tokens of the chunks whose next one is sampled, and the live slots it stays with (-1: none).
    sample_tokens_N: torch.Tensor
    kept_slots_N: torch.Tensor
    delta: DeltaChunks
    attention: PromptChunks

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]


def prefill_numbers(
    chunks: Sequence[PrefillChunk], shape: StoreShape, capacity: PrefillCapacity | None = None
) -> PrefillNumbers:
    """Work out the chunks' numbers on the host; without a capacity, for exactly these chunks."""
    lengths = [len(chunk.token_ids) for chunk in chunks]
    sampled = [i for i, chunk in enumerate(chunks) if chunk.sampling is not None]
    ends = list(accumulate(lengths))
    num_tokens = ends[-1] if capacity is None else capacity.num_tokens
    num_chunks = len(chunks) if capacity is None else capacity.num_chunks
    num_samples = len(sampled) if capacity is None else num_chunks
    of_tokens = [
        _padded([token for chunk in chunks for token in chunk.token_ids], num_tokens, 0),
        _padded(_positions(chunks), num_tokens, 0),
        _padded(_token_slots(chunks, shape.page_tokens), num_tokens, -1),
        _padded([ends[i] - 1 for i in sampled], num_samples, 0),
        _padded([chunks[i].state_slot for i in sampled], num_samples, NO_SLOT),
    ]
    delta = chunk_lists(
        [_chunk_slots(chunk) for chunk in chunks],
        shape.page_tokens,
        None if capacity is None else ChunkCapacity.of(num_chunks, num_tokens, shape.page_tokens),
    )
    ...
    sections = [*of_tokens, *(np.array(numbers, dtype=np.int64) for numbers in (*delta.values(),))]
    return PrefillNumbers(np.concatenate(sections), tuple(len(section) for section in sections))


def _chunk_slots(chunk: PrefillChunk) -> ChunkSlots:
    return ChunkSlots(
        num_tokens=len(chunk.token_ids),
        read_slot=NO_SLOT if chunk.state_read_slot is None else chunk.state_read_slot,
        live_slot=chunk.state_slot,
        checkpoints=tuple((c.num_tokens - chunk.start, c.slot) for c in chunk.checkpoints),
    )


def _padded(numbers: Sequence[int], size: int, padding: int) -> np.ndarray:
    section = np.full(size, padding, dtype=np.int64)
    section[: len(numbers)] = numbers
    return section


def _bounds(lengths: Sequence[int], num_chunks: int) -> np.ndarray:
    """`[0, l0, l0 + l1, ...]`; chunks that are not there are empty."""
    bounds = np.zeros(num_chunks + 1, dtype=np.int64)
    bounds[1 : len(lengths) + 1] = np.cumsum(lengths, dtype=np.int64)
    bounds[len(lengths) + 1 :] = bounds[len(lengths)]
    return bounds


def _positions(chunks: Sequence[PrefillChunk]) -> list[int]:
    return [place for c in chunks for place in range(c.start, c.start + len(c.token_ids))]


def _token_slots(chunks: Sequence[PrefillChunk], page_tokens: int) -> list[int]:
    slots: list[int] = []
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        for first in range(chunk.start, end, page_tokens):
            base = chunk.page_ids[first // page_tokens] * page_tokens
            slots.extend(range(base, base + min(page_tokens, end - first)))
    return slots


def _checkpoint_slots(
    chunks: Sequence[PrefillChunk], num_pages: Sequence[int], page_tokens: int
) -> list[int]:
    """For each page of each chunk the slot that also gets the state after it."""
    slots: list[int] = []
    for chunk, count in zip(chunks, num_pages, strict=True):
        of_chunk = [NO_SLOT] * count
        for checkpoint in chunk.checkpoints:
            of_chunk[(checkpoint.num_tokens - chunk.start) // page_tokens - 1] = checkpoint.slot
        slots.extend(of_chunk)
    return slots


def _tiles(
    lengths: Sequence[int], tile_tokens: int, capacity: PrefillCapacity | None
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk and first token (within it) of every tile."""
    tiles = [(n, start) for n, length in enumerate(lengths) for start in range(0, length, tile_tokens)]
    size = len(tiles) if capacity is None else capacity.num_tiles(tile_tokens)
    return _padded([n for n, _ in tiles], size, _NO_TILE), _padded([start for _, start in tiles], size, 0)
