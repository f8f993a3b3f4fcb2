"""Where the prefill chunks of a step find and leave what they remember.

Legend: `N` chunks, `J` rows of convolution tail, `P` ring capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import PrefillChunk
from kiln_engine.model.index_lists import IndexLists, StoreShape


@dataclass(frozen=True)
class PrefillLayout:
    """Everything the chunks look up; token numbers count from the first chunk's first token."""

    num_tokens: int
    cu_seqlens: tuple[int, ...]
    page_tables: tuple[torch.Tensor, ...]
    context_lengths: tuple[int, ...]
    # Slot of each chunk's first state; `fresh_N` marks those that start from zeros instead.
    read_slots_N: torch.Tensor
    fresh_N: torch.Tensor | None
    all_fresh: bool
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
    # Ring of each chunk: its tokens since the last boundary, padded with `num_tokens`.
    ring_slots_N: torch.Tensor
    ring_tokens: torch.Tensor  # [N * P]
    # The same tokens' convolution rows.
    ring_conv_tokens: torch.Tensor
    ring_conv_targets: torch.Tensor


class PrefillLists:
    """Collects the chunks' numbers, and makes their layout once they are on the device."""

    def __init__(self, lists: IndexLists, chunks: Sequence[PrefillChunk], shape: StoreShape) -> None:
        self._chunks = chunks
        self._shape = shape
        tail, per_slot = shape.num_tail_rows, shape.conv_rows_per_slot
        bounds = [0]
        for chunk in chunks:
            bounds.append(bounds[-1] + len(chunk.token_ids))
        self._bounds = tuple(bounds)
        num_tokens = bounds[-1]
        ends = [len(chunk.token_ids) // shape.page_tokens * shape.page_tokens for chunk in chunks]
        writes = [_boundary_writes(chunk, end) for chunk, end in zip(chunks, ends, strict=True)]
        self._boundaries = tuple(tuple(offset for offset, _ in of_chunk if offset) for of_chunk in writes)
        reads = [chunk.state_read_slot or 0 for chunk in chunks]
        ring = [
            list(range(first + end, last)) for first, last, end in zip(bounds, bounds[1:], ends, strict=False)
        ]
        self._lists = {
            "reads": lists.add(reads),
            "fresh": lists.add([int(chunk.state_read_slot is None) for chunk in chunks]),
            "initial_tails": lists.add([slot * per_slot + place for slot in reads for place in range(tail)]),
            "boundary_slots": lists.add([slot for of in writes for offset, slot in of if offset]),
            "unmoved": lists.add([n for n, of in enumerate(writes) for offset, _ in of if not offset]),
            "unmoved_slots": lists.add([slot for of in writes for offset, slot in of if not offset]),
            "tail_sources": lists.add(
                [
                    # Token i of chunk n is row N * J + bounds[n] + i of [initial tails | tokens].
                    n * tail + place if place < tail else len(chunks) * tail + bounds[n] + place - tail
                    for n, of in enumerate(writes)
                    for offset, _ in of
                    for place in range(offset, offset + tail)
                ]
            ),
            "tail_targets": lists.add(
                [slot * per_slot + place for of in writes for _, slot in of for place in range(tail)]
            ),
            "ring_slots": lists.add([chunk.state_slot for chunk in chunks]),
            "ring_tokens": lists.add(
                [
                    token
                    for of in ring
                    for token in (*of, *(num_tokens for _ in range(shape.ring_capacity - len(of))))
                ]
            ),
            "ring_conv_tokens": lists.add([token for of in ring for token in of]),
            "ring_conv_targets": lists.add(
                [
                    chunk.state_slot * per_slot + tail + place
                    for chunk, of in zip(chunks, ring, strict=True)
                    for place in range(len(of))
                ]
            ),
        }
        self._tables = [
            lists.add(list(chunk.page_ids[: -(-(chunk.start + len(chunk.token_ids)) // shape.page_tokens)]))
            for chunk in chunks
        ]

    def layout(self, parts: Sequence[torch.Tensor]) -> PrefillLayout:
        index = {name: parts[number] for name, number in self._lists.items()}
        num_fresh = sum(chunk.state_read_slot is None for chunk in self._chunks)
        return PrefillLayout(
            num_tokens=self._bounds[-1],
            cu_seqlens=self._bounds,
            page_tables=tuple(parts[number] for number in self._tables),
            context_lengths=tuple(chunk.start + len(chunk.token_ids) for chunk in self._chunks),
            read_slots_N=index["reads"],
            fresh_N=index["fresh"].bool() if num_fresh else None,
            all_fresh=num_fresh == len(self._chunks),
            initial_tail_rows=index["initial_tails"],
            boundaries=self._boundaries,
            boundary_slots=index["boundary_slots"],
            unmoved=index["unmoved"],
            unmoved_slots=index["unmoved_slots"],
            tail_sources=index["tail_sources"],
            tail_targets=index["tail_targets"],
            ring_slots_N=index["ring_slots"],
            ring_tokens=index["ring_tokens"],
            ring_conv_tokens=index["ring_conv_tokens"],
            ring_conv_targets=index["ring_conv_targets"],
        )


def _boundary_writes(chunk: PrefillChunk, last_boundary: int) -> list[tuple[int, int]]:
    """(offset within the chunk, slot) of every state the chunk leaves behind."""
    writes = [(checkpoint.num_tokens - chunk.start, checkpoint.slot) for checkpoint in chunk.checkpoints]
    writes.append((last_boundary, chunk.state_slot))
    return writes
