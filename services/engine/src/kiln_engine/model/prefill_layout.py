"""Where the prefill chunks of a step find and leave what they remember.

All numbers of a step's chunks are one flat list with a section for each purpose. With a capacity
the sections have the same places in every step, so that a captured graph finds them; chunks, tokens
and tiles behind the last one are empty.

Legend: `T` tokens, `N` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kiln_engine.domain.plan import PrefillChunk
from kiln_engine.model.carried_hidden import IN_PASS, NOT_KEPT
from kiln_engine.model.store_shape import StoreShape
from kiln_nn.kernels.delta_prefill import NO_SLOT, ChunkCapacity, ChunkSlots, DeltaChunks, chunk_lists
from kiln_nn.kernels.paged_attention import AttentionChunks, choose_tile_tokens, chunk_tiles, most_tiles


@dataclass(frozen=True)
class PrefillCapacity:
    """Most tokens and chunks of a step's prefill, as a captured graph counts them."""

    num_tokens: int
    num_chunks: int


@dataclass(frozen=True)
class PrefillLayout:
    """Views of one flat int64 tensor on the device; token numbers count from the first chunk's first."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    # Where each token's key and value go; -1 for padding.
    token_slots_T: torch.Tensor
    # Where the hidden state of the token before each is found, as CarriedHidden says it.
    carried_slots_T: torch.Tensor
    # The last tokens of the chunks whose next one is sampled, and the live slots it stays with (-1: none).
    sample_tokens_N: torch.Tensor
    kept_slots_N: torch.Tensor
    delta: DeltaChunks
    attention: AttentionChunks
    # Each chunk's line of the page table.
    table_rows_N: torch.Tensor
    # Each chunk's last token; any for a chunk that is padding.
    last_tokens_N: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]


@dataclass(frozen=True)
class PrefillNumbers:
    """The numbers of all sections, one after the other, and the sections' sizes."""

    flat: np.ndarray
    section_sizes: tuple[int, ...]
    tile_tokens: int

    def layout(self, flat: torch.Tensor) -> PrefillLayout:
        """The layout of a tensor that holds these numbers, or others with the same capacity."""
        tokens, places, slots, carried, samples, kept, *rest = flat.split(list(self.section_sizes))
        *delta, lines, lasts, contexts, tile_chunks, tile_starts = rest
        chunks = DeltaChunks(*delta)
        return PrefillLayout(
            token_ids_T=tokens,
            positions_T=places,
            token_slots_T=slots,
            carried_slots_T=carried,
            sample_tokens_N=samples,
            kept_slots_N=kept,
            delta=chunks,
            attention=AttentionChunks(
                chunks.cu_seqlens_N1, contexts, tile_chunks, tile_starts, self.tile_tokens
            ),
            table_rows_N=lines,
            last_tokens_N=lasts,
        )


def prefill_numbers(
    chunks: Sequence[PrefillChunk], shape: StoreShape, capacity: PrefillCapacity | None = None
) -> PrefillNumbers:
    """Work out the chunks' numbers on the host; without a capacity, for exactly these chunks."""
    lengths = [len(chunk.token_ids) for chunk in chunks]
    ends = list(accumulate(lengths))
    sampled = [i for i, chunk in enumerate(chunks) if chunk.sampling is not None]
    num_samples = len(sampled)
    delta_capacity = tile_capacity = None
    tile_tokens = max(1, shape.graph_tile_rows // (1 << (shape.num_grouped_heads - 1).bit_length()))
    if capacity is None:
        num_tokens, num_chunks = ends[-1], len(chunks)
        if not shape.has_one_tile_size:
            tile_tokens = choose_tile_tokens(lengths, shape.num_grouped_heads)
    else:
        num_tokens, num_chunks = capacity.num_tokens, capacity.num_chunks
        num_samples = num_chunks
        tile_capacity = most_tiles(num_chunks, num_tokens, tile_tokens)
        delta_capacity = ChunkCapacity.of(num_chunks, num_tokens, shape.page_tokens)
    delta = chunk_lists([_chunk_slots(chunk) for chunk in chunks], shape.page_tokens, delta_capacity)
    contexts = [chunk.start + length for chunk, length in zip(chunks, lengths, strict=True)]
    tiles = chunk_tiles(lengths, contexts, tile_tokens, tile_capacity)
    sections = [
        _padded([token for chunk in chunks for token in chunk.token_ids], num_tokens, 0),
        _padded(_positions(chunks), num_tokens, 0),
        _padded(_token_slots(chunks, shape.page_tokens), num_tokens, -1),
        _carried_slots(chunks, num_tokens),
        _padded([ends[i] - 1 for i in sampled], num_samples, 0),
        _padded([chunks[i].state_slot for i in sampled], num_samples, NO_SLOT),
        *(np.array(numbers, dtype=np.int64) for numbers in delta.values()),
        _padded([chunk.state_slot for chunk in chunks], num_chunks, shape.spare_line),
        _padded([end - 1 for end in ends], num_chunks, 0),
        _padded(contexts, num_chunks, 0),
        *(np.array(numbers, dtype=np.int64) for numbers in tiles),
    ]
    sizes = tuple(len(section) for section in sections)
    return PrefillNumbers(np.concatenate(sections), sizes, tile_tokens)


def _padded(numbers: Sequence[int], size: int, padding: int) -> np.ndarray:
    section = np.full(size, padding, dtype=np.int64)
    section[: len(numbers)] = numbers
    return section


def _chunk_slots(chunk: PrefillChunk) -> ChunkSlots:
    return ChunkSlots(
        num_tokens=len(chunk.token_ids),
        read_slot=NO_SLOT if chunk.state_read_slot is None else chunk.state_read_slot,
        live_slot=chunk.state_slot,
        checkpoints=tuple((c.num_tokens - chunk.start, c.slot) for c in chunk.checkpoints),
    )


def _positions(chunks: Sequence[PrefillChunk]) -> list[int]:
    return [place for c in chunks for place in range(c.start, c.start + len(c.token_ids))]


def _carried_slots(chunks: Sequence[PrefillChunk], num_tokens: int) -> np.ndarray:
    """What stands before a chunk that begins at a shared checkpoint has not been kept."""
    slots, start = np.full(num_tokens, NOT_KEPT, dtype=np.int64), 0
    for chunk in chunks:
        end = start + len(chunk.token_ids)
        goes_on = chunk.start > 0 and chunk.state_read_slot == chunk.state_slot
        slots[start] = chunk.state_slot if goes_on else NOT_KEPT
        slots[start + 1 : end] = IN_PASS
        start = end
    return slots


def _token_slots(chunks: Sequence[PrefillChunk], page_tokens: int) -> list[int]:
    slots: list[int] = []
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        for first in range(chunk.start, end, page_tokens):
            base = chunk.page_ids[first // page_tokens] * page_tokens
            slots.extend(range(base, base + min(page_tokens, end - first)))
    return slots
