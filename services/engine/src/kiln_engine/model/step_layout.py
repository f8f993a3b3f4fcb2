"""Where everything of one step lies: a BatchPlan turned into index tensors.

The step's tokens are flat: first one per decode row, then the prefill chunks, end to end. All
index lists travel to the device as one tensor, once per step; the layers only look things up.

Legend: `T` tokens, `R` decode rows, `N` chunks, `M` most pages of any row, `J` rows of convolution
tail, `P` ring capacity, `h`/`H` key and value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk
from kiln_nn.kernels.gated_delta import ring_mask


@dataclass(frozen=True)
class StoreShape:
    """The numbers of the stores that decide where things lie."""

    page_tokens: int
    num_tail_rows: int  # J
    ring_capacity: int  # P
    num_key_heads: int  # h
    num_heads: int  # H

    @property
    def conv_rows_per_slot(self) -> int:
        return self.num_tail_rows + self.ring_capacity


@dataclass(frozen=True)
class CommitLayout:
    """The decode rows whose token completes a page."""

    rows: torch.Tensor  # among the decode rows
    ring_slots: torch.Tensor
    ring_lengths: torch.Tensor  # page_tokens, for each
    to_slots: torch.Tensor
    tail_sources: torch.Tensor  # J convolution rows each
    tail_targets: torch.Tensor


@dataclass(frozen=True)
class DecodeLayout:
    """Everything the decode rows look up."""

    num_rows: int
    page_table_RM: torch.Tensor
    context_lengths_R: torch.Tensor
    read_slots_R: torch.Tensor
    ring_slots_R: torch.Tensor
    ring_mask_R1P: torch.Tensor
    key_entries: torch.Tensor  # [R * h] ring entries of this step's keys
    value_entries: torch.Tensor  # [R * H] the same for values and decays
    tail_rows: torch.Tensor  # [R * J] convolution rows before each token
    conv_targets_R: torch.Tensor
    commit: CommitLayout | None


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


@dataclass(frozen=True)
class StepLayout:
    """One step's index tensors."""

    num_tokens: int
    num_decode_rows: int
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    token_slots_T: torch.Tensor
    # The tokens whose next one is sampled, in the order of StepResult.rows.
    sample_tokens: torch.Tensor
    num_samples: int
    begun_pages: torch.Tensor
    moved_to_slots: torch.Tensor
    decode: DecodeLayout | None
    prefill: PrefillLayout | None


class _IndexLists:
    """Named lists of numbers that become views of one device tensor."""

    def __init__(self) -> None:
        self._lists: list[list[int]] = []

    def add(self, numbers: list[int]) -> int:
        self._lists.append(numbers)
        return len(self._lists) - 1

    def to_device(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        numbers = torch.tensor([number for part in self._lists for number in part], dtype=torch.long)
        return numbers.to(device, non_blocking=True).split([len(part) for part in self._lists])


def build_layout(plan: BatchPlan, shape: StoreShape, device: torch.device) -> StepLayout:
    """Work out one step's indices on the host and send them to the device."""
    lists = _IndexLists()
    decode = _DecodeLists(lists, plan.decode_rows, shape) if plan.decode_rows else None
    prefill = _PrefillLists(lists, plan.prefill_chunks, shape) if plan.prefill_chunks else None
    num_rows = len(plan.decode_rows)
    token_ids = [row.token_id for row in plan.decode_rows]
    positions = [row.position for row in plan.decode_rows]
    samples = list(range(num_rows))
    num_tokens = num_rows
    for chunk in plan.prefill_chunks:
        token_ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
        num_tokens += len(chunk.token_ids)
        if chunk.sampling is not None:
            samples.append(num_tokens - 1)
    ids = lists.add(token_ids)
    places = lists.add(positions)
    slots = lists.add(_token_slots(plan, shape.page_tokens))
    sampled = lists.add(samples)
    begun = lists.add(_begun_pages(plan, shape.page_tokens))
    moved = lists.add(
        [
            row.state_commit_slot
            for row in plan.decode_rows
            if row.state_commit_slot not in (None, row.state_slot)
        ]
    )
    parts = lists.to_device(device)
    return StepLayout(
        num_tokens=num_tokens,
        num_decode_rows=num_rows,
        token_ids_T=parts[ids],
        positions_T=parts[places],
        token_slots_T=parts[slots],
        sample_tokens=parts[sampled],
        num_samples=len(samples),
        begun_pages=parts[begun],
        moved_to_slots=parts[moved],
        decode=decode.layout(parts) if decode else None,
        prefill=prefill.layout(parts, device) if prefill else None,
    )


def _token_slots(plan: BatchPlan, page_tokens: int) -> list[int]:
    slots = [
        row.page_ids[row.position // page_tokens] * page_tokens + row.position % page_tokens
        for row in plan.decode_rows
    ]
    for chunk in plan.prefill_chunks:
        end = chunk.start + len(chunk.token_ids)
        for first in range(chunk.start, end, page_tokens):
            base = chunk.page_ids[first // page_tokens] * page_tokens
            slots.extend(range(base, base + min(page_tokens, end - first)))
    return slots


def _begun_pages(plan: BatchPlan, page_tokens: int) -> list[int]:
    """Pages that this step begins without filling them."""
    pages = [
        row.page_ids[row.position // page_tokens]
        for row in plan.decode_rows
        if row.position % page_tokens == 0
    ]
    for chunk in plan.prefill_chunks:
        end = chunk.start + len(chunk.token_ids)
        if end % page_tokens:
            pages.append(chunk.page_ids[end // page_tokens])
    return pages


class _DecodeLists:
    def __init__(self, lists: _IndexLists, rows: Sequence[DecodeRow], shape: StoreShape) -> None:
        self._num_rows = len(rows)
        self._shape = shape
        lengths = [row.position % shape.page_tokens for row in rows]
        self._num_pages = max(row.position // shape.page_tokens + 1 for row in rows)
        table: list[int] = []
        for row in rows:
            pages = row.page_ids[: row.position // shape.page_tokens + 1]
            # A row's own page pads its line: another's might hold anything.
            table.extend(pages)
            table.extend(pages[:1] * (self._num_pages - len(pages)))
        self._table = lists.add(table)
        self._contexts = lists.add([row.position + 1 for row in rows])
        self._reads = lists.add([row.state_read_slot for row in rows])
        self._rings = lists.add([row.state_slot for row in rows])
        self._lengths = lists.add(lengths)
        pairs = list(zip(rows, lengths, strict=True))
        self._tails = lists.add([row for pair in pairs for row in _conv_window(*pair, shape)])
        self._conv_targets = lists.add(
            [
                row.state_slot * shape.conv_rows_per_slot + shape.num_tail_rows + length
                for row, length in pairs
            ]
        )
        committing = [
            (index, row, length)
            for index, (row, length) in enumerate(pairs)
            if row.state_commit_slot is not None
        ]
        self._num_commits = len(committing)
        self._commit = [
            lists.add([index for index, _, _ in committing]),
            lists.add([row.state_slot for _, row, _ in committing]),
            lists.add([length + 1 for _, _, length in committing]),
            lists.add([row.state_commit_slot or 0 for _, row, _ in committing]),
            lists.add(
                [source for _, row, length in committing for source in _conv_window(row, length + 1, shape)]
            ),
            lists.add(
                [
                    (row.state_commit_slot or 0) * shape.conv_rows_per_slot + place
                    for _, row, _ in committing
                    for place in range(shape.num_tail_rows)
                ]
            ),
        ]

    def layout(self, parts: Sequence[torch.Tensor]) -> DecodeLayout:
        shape, slots, lengths = self._shape, parts[self._rings], parts[self._lengths]
        commit = None
        if self._num_commits:
            commit = CommitLayout(*(parts[number] for number in self._commit))
        return DecodeLayout(
            num_rows=self._num_rows,
            page_table_RM=parts[self._table].view(self._num_rows, self._num_pages),
            context_lengths_R=parts[self._contexts],
            read_slots_R=parts[self._reads],
            ring_slots_R=slots,
            ring_mask_R1P=ring_mask(lengths, shape.ring_capacity),
            key_entries=_ring_entries(slots, lengths, shape.num_key_heads, shape.ring_capacity),
            value_entries=_ring_entries(slots, lengths, shape.num_heads, shape.ring_capacity),
            tail_rows=parts[self._tails],
            conv_targets_R=parts[self._conv_targets],
            commit=commit,
        )


def _ring_entries(
    slots_R: torch.Tensor, lengths_R: torch.Tensor, num_heads: int, capacity: int
) -> torch.Tensor:
    """Entry `(slot * heads + head) * capacity + length` for every row and head, `[R * heads]`."""
    heads = torch.arange(num_heads, device=slots_R.device) * capacity
    first = slots_R * (num_heads * capacity) + lengths_R
    return (first[:, None] + heads).flatten()


def _conv_window(row: DecodeRow, length: int, shape: StoreShape) -> list[int]:
    """Convolution rows of the J tokens before the one at ring place `length`.

    Those before the page boundary are the tail kept with the committed state.
    """
    tail, per_slot = shape.num_tail_rows, shape.conv_rows_per_slot
    return [
        (row.state_read_slot if place < tail else row.state_slot) * per_slot + place
        for place in range(length, length + tail)
    ]


class _PrefillLists:
    def __init__(self, lists: _IndexLists, chunks: Sequence[PrefillChunk], shape: StoreShape) -> None:
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

    def layout(self, parts: Sequence[torch.Tensor], device: torch.device) -> PrefillLayout:
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
