"""The prefill chunks of a step: where each finds and leaves what its sequence remembers.

Legend: `N` chunks, `G` pages of all chunks, `B` tiles, `P` ring capacity, `J` rows of convolution tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kiln_nn.kernels.checks import ShapeMismatch, check_shape
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaMemory

# Tokens that the kernels take at a time.
TILE_TOKENS = 64


@dataclass(frozen=True)
class ChunkSlots:
    """One chunk on the host: its tokens, from a page boundary on, and the slots of its states."""

    num_tokens: int
    read_slot: int = NO_SLOT
    live_slot: int = NO_SLOT
    # (tokens of the chunk, a multiple of the page; slot that gets the state after them)
    checkpoints: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChunkCapacity:
    """Entries of the lists of a step that a CUDA graph replays with other contents."""

    num_chunks: int
    num_pages: int
    num_tiles: int

    @classmethod
    def of(cls, num_chunks: int, num_tokens: int, page_tokens: int) -> ChunkCapacity:
        """Enough for any division of `num_tokens` tokens into at most `num_chunks` chunks."""
        return cls(num_chunks, num_tokens // page_tokens + num_chunks, num_tokens // TILE_TOKENS + num_chunks)


@dataclass(frozen=True, eq=False)
class DeltaChunks:
    """The chunks as integer device tensors, the same for all layers of a step.

    Chunk `n` is the tokens `cu_seqlens[n]` to `cu_seqlens[n + 1]`; an empty one pads the list.
    It starts from the state and convolution tail in `read_slots` (NO_SLOT: zeros). State and
    tail of its last page boundary (its start, if it reaches none) and the ring of the tokens behind
    it go to `live_slots` (NO_SLOT: nowhere). Page `p` of it is entry `cu_pages[n] + p` of
    `checkpoint_slots`: the slot that gets state and tail after that page as well, mostly NO_SLOT.

    The tiles of `TILE_TOKENS` tokens are named by their chunk and offset in it, in any order; a
    chunk of NO_SLOT pads. A slot that one chunk reads, no other chunk of the step may write.

    Sizes are capacities: what a CUDA graph captured may be replayed with other contents. The
    reference reads the contents once, so there an object describes one step.
    """

    cu_seqlens_N1: torch.Tensor
    read_slots_N: torch.Tensor
    live_slots_N: torch.Tensor
    cu_pages_N1: torch.Tensor
    checkpoint_slots_G: torch.Tensor
    tile_chunks_B: torch.Tensor
    tile_starts_B: torch.Tensor
    # What the reference derives from the above, once per step: by store shape.
    _indices: dict[tuple[int, ...], ChunkIndices] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_chunks(self) -> int:
        return self.read_slots_N.shape[0]

    def check(self) -> None:
        """Compare the sizes of the lists.

        Raises:
            ShapeMismatch: one of them does not fit.
        """
        check_shape("read_slots", self.read_slots_N, (None,))
        check_shape("live_slots", self.live_slots_N, (self.num_chunks,))
        check_shape("cu_seqlens", self.cu_seqlens_N1, (self.num_chunks + 1,))
        check_shape("cu_pages", self.cu_pages_N1, (self.num_chunks + 1,))
        check_shape("checkpoint_slots", self.checkpoint_slots_G, (None,))
        check_shape("tile_starts", self.tile_starts_B, tuple(self.tile_chunks_B.shape))

    def indices(self, memory: DeltaMemory) -> ChunkIndices:
        """Row numbers into tensors shaped like `memory`'s. Waits for the device."""
        capacity, num_conv_rows = memory.ring.k_RhPK.shape[2], memory.conv_rows_SQC.shape[1]
        key = (memory.page_tokens, capacity, num_conv_rows)
        if key not in self._indices:
            chunks = _on_host(self, memory.page_tokens)
            self._indices[key] = _chunk_indices(chunks, *key, self.read_slots_N.device)
        return self._indices[key]


def chunk_lists(
    chunks: Sequence[ChunkSlots], page_tokens: int, capacity: ChunkCapacity | None = None
) -> dict[str, list[int]]:
    """The contents of `DeltaChunks` under its field names, padded to `capacity`.

    Raises:
        ShapeMismatch: more than the capacity, or a checkpoint that is no page boundary of its chunk.
    """
    cu_seqlens, cu_pages, slots = [0], [0], []
    tiles: list[tuple[int, int]] = []
    for number, chunk in enumerate(chunks):
        cu_seqlens.append(cu_seqlens[-1] + chunk.num_tokens)
        pages = [NO_SLOT] * -(-chunk.num_tokens // page_tokens)
        for num_tokens, slot in chunk.checkpoints:
            if num_tokens % page_tokens or not 0 < num_tokens <= chunk.num_tokens:
                raise ShapeMismatch(
                    "checkpoint", (num_tokens,), (f"multiple of {page_tokens} to {chunk.num_tokens}",)
                )
            pages[num_tokens // page_tokens - 1] = slot
        slots += pages
        cu_pages.append(len(slots))
        tiles += [(number, start) for start in range(0, chunk.num_tokens, TILE_TOKENS)]
    lists = {
        "cu_seqlens_N1": cu_seqlens,
        "read_slots_N": [chunk.read_slot for chunk in chunks],
        "live_slots_N": [chunk.live_slot for chunk in chunks],
        "cu_pages_N1": cu_pages,
        "checkpoint_slots_G": slots,
        "tile_chunks_B": [chunk for chunk, _ in tiles],
        "tile_starts_B": [start for _, start in tiles],
    }
    return lists if capacity is None else _padded(lists, capacity)


def _padded(lists: dict[str, list[int]], capacity: ChunkCapacity) -> dict[str, list[int]]:
    sizes = {
        "cu_seqlens_N1": (capacity.num_chunks + 1, lists["cu_seqlens_N1"][-1]),
        "read_slots_N": (capacity.num_chunks, NO_SLOT),
        "live_slots_N": (capacity.num_chunks, NO_SLOT),
        "cu_pages_N1": (capacity.num_chunks + 1, lists["cu_pages_N1"][-1]),
        "checkpoint_slots_G": (capacity.num_pages, NO_SLOT),
        "tile_chunks_B": (capacity.num_tiles, NO_SLOT),
        "tile_starts_B": (capacity.num_tiles, 0),
    }
    for name, (size, filler) in sizes.items():
        if len(lists[name]) > size:
            raise ShapeMismatch(name, (len(lists[name]),), (f"at most {size}",))
        lists[name] += [filler] * (size - len(lists[name]))
    return lists


@dataclass(frozen=True)
class ChunkIndices:
    """The reference's index lists for the chunks in use; tokens count from the step's first."""

    cu_seqlens: tuple[int, ...]
    # Slot of each chunk's first state; `is_fresh_N` marks those that start from zeros instead.
    read_slots_N: torch.Tensor
    is_fresh_N: torch.Tensor
    initial_tail_rows: torch.Tensor  # [N * J]
    # Offsets within each chunk where the state is written, and the slots they go to, in order.
    boundaries: tuple[tuple[int, ...], ...]
    boundary_slots: torch.Tensor
    # Chunks that reach no boundary hand their first state on.
    unmoved: torch.Tensor
    unmoved_slots: torch.Tensor
    # Rows of [initial tails | tokens] that become convolution tails, and where they go.
    tail_sources: torch.Tensor
    tail_targets: torch.Tensor
    # Rings of the chunks that keep one: tokens since the last boundary, padded with T.
    ring_slots: torch.Tensor
    ring_tokens: torch.Tensor  # [rings * P]
    # The same tokens' convolution rows.
    ring_conv_tokens: torch.Tensor
    ring_conv_targets: torch.Tensor


def _on_host(chunks: DeltaChunks, page_tokens: int) -> list[ChunkSlots]:
    """The chunks in use, as `chunk_lists` took them."""
    bounds, pages = chunks.cu_seqlens_N1.tolist(), chunks.cu_pages_N1.tolist()
    reads, lives = chunks.read_slots_N.tolist(), chunks.live_slots_N.tolist()
    checkpoints = chunks.checkpoint_slots_G.tolist()
    return [
        ChunkSlots(
            bounds[n + 1] - bounds[n],
            reads[n],
            lives[n],
            tuple(
                ((page + 1) * page_tokens, slot)
                for page, slot in enumerate(checkpoints[pages[n] : pages[n + 1]])
                if slot >= 0 and (page + 1) * page_tokens <= bounds[n + 1] - bounds[n]
            ),
        )
        for n in range(chunks.num_chunks)
        if bounds[n + 1] > bounds[n]
    ]


def _chunk_indices(
    chunks: Sequence[ChunkSlots], page_tokens: int, capacity: int, per_slot: int, device: torch.device
) -> ChunkIndices:
    tail = per_slot - capacity
    bounds = [0]
    for chunk in chunks:
        bounds.append(bounds[-1] + chunk.num_tokens)
    ends = [chunk.num_tokens // page_tokens * page_tokens for chunk in chunks]
    writes = [_state_writes(chunk, end) for chunk, end in zip(chunks, ends, strict=True)]
    reads = [max(chunk.read_slot, 0) for chunk in chunks]
    rings = [
        (chunk.live_slot, range(bounds[n] + ends[n], bounds[n + 1]))
        for n, chunk in enumerate(chunks)
        if chunk.live_slot >= 0
    ]

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    return ChunkIndices(
        cu_seqlens=tuple(bounds),
        read_slots_N=on_device(reads),
        is_fresh_N=on_device([chunk.read_slot < 0 for chunk in chunks]).bool(),
        initial_tail_rows=on_device([slot * per_slot + place for slot in reads for place in range(tail)]),
        boundaries=tuple(tuple(offset for offset, _ in of_chunk if offset) for of_chunk in writes),
        boundary_slots=on_device([slot for of in writes for offset, slot in of if offset]),
        unmoved=on_device([n for n, of in enumerate(writes) for offset, _ in of if not offset]),
        unmoved_slots=on_device([slot for of in writes for offset, slot in of if not offset]),
        tail_sources=on_device(
            [
                # Token i of chunk n is row N * J + bounds[n] + i of [initial tails | tokens].
                n * tail + place if place < tail else len(chunks) * tail + bounds[n] + place - tail
                for n, of in enumerate(writes)
                for offset, _ in of
                for place in range(offset, offset + tail)
            ]
        ),
        tail_targets=on_device(
            [slot * per_slot + place for of in writes for _, slot in of for place in range(tail)]
        ),
        ring_slots=on_device([slot for slot, _ in rings]),
        ring_tokens=on_device(
            [
                token
                for _, tokens in rings
                for token in (*tokens, *(bounds[-1] for _ in range(capacity - len(tokens))))
            ]
        ),
        ring_conv_tokens=on_device([token for _, tokens in rings for token in tokens]),
        ring_conv_targets=on_device(
            [slot * per_slot + tail + place for slot, tokens in rings for place in range(len(tokens))]
        ),
    )


def _state_writes(chunk: ChunkSlots, last_boundary: int) -> list[tuple[int, int]]:
    """(offset within the chunk, slot) of every state the chunk leaves behind."""
    live = [(last_boundary, chunk.live_slot)] if chunk.live_slot >= 0 else []
    return [*chunk.checkpoints, *live]
