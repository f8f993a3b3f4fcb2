"""Where the decode rows of a step find and leave what they remember.

Legend: `R` decode rows, `M` most pages of any row of a group, `J` rows of convolution tail, `P`
ring capacity, `h`/`H` key and value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import DecodeRow
from kiln_engine.model.index_lists import IndexLists, StoreShape
from kiln_nn.kernels.gated_delta import ring_mask

# Most tokens whose keys and values attention copies out of the pages at once (padding included)
# for decode rows: without a bound, one long row would pad all of its neighbours to its length.
MOST_GATHERED_TOKENS = 65_536


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
class AttentionGroup:
    """Decode rows whose pages are read together, each line padded to the longest."""

    rows: torch.Tensor  # among the decode rows
    page_table_RM: torch.Tensor
    context_lengths_R: torch.Tensor


@dataclass(frozen=True)
class DecodeLayout:
    """Everything the decode rows look up."""

    num_rows: int
    # Every row is in one of them; a single group has the rows in their order.
    attention: tuple[AttentionGroup, ...]
    read_slots_R: torch.Tensor
    ring_slots_R: torch.Tensor
    ring_mask_R1P: torch.Tensor
    key_entries: torch.Tensor  # [R * h] ring entries of this step's keys
    value_entries: torch.Tensor  # [R * H] the same for values and decays
    tail_rows: torch.Tensor  # [R * J] convolution rows before each token
    conv_targets_R: torch.Tensor
    commit: CommitLayout | None


class DecodeLists:
    """Collects the decode rows' numbers, and makes their layout once they are on the device."""

    def __init__(self, lists: IndexLists, rows: Sequence[DecodeRow], shape: StoreShape) -> None:
        self._num_rows = len(rows)
        self._shape = shape
        lengths = [row.position % shape.page_tokens for row in rows]
        self._groups = [
            (
                lists.add(group),
                lists.add(_padded_pages([rows[i] for i in group], shape.page_tokens)),
                lists.add([rows[i].position + 1 for i in group]),
            )
            for group in _attention_groups([row.position + 1 for row in rows])
        ]
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
            attention=tuple(
                AttentionGroup(parts[rows], parts[table].view(len(parts[rows]), -1), parts[contexts])
                for rows, table, contexts in self._groups
            ),
            read_slots_R=parts[self._reads],
            ring_slots_R=slots,
            ring_mask_R1P=ring_mask(lengths, shape.ring_capacity),
            key_entries=_ring_entries(slots, lengths, shape.num_key_heads, shape.ring_capacity),
            value_entries=_ring_entries(slots, lengths, shape.num_heads, shape.ring_capacity),
            tail_rows=parts[self._tails],
            conv_targets_R=parts[self._conv_targets],
            commit=commit,
        )


def _attention_groups(context_lengths: Sequence[int]) -> list[list[int]]:
    """Rows whose padded contexts together stay within `MOST_GATHERED_TOKENS`, or one longer row."""
    by_length = sorted(range(len(context_lengths)), key=lambda row: -context_lengths[row])
    groups: list[list[int]] = []
    first = 0
    while first < len(by_length):
        num_rows = max(1, MOST_GATHERED_TOKENS // context_lengths[by_length[first]])
        groups.append(sorted(by_length[first : first + num_rows]))
        first += num_rows
    return groups


def _padded_pages(rows: Sequence[DecodeRow], page_tokens: int) -> list[int]:
    """Page ids line by line; a row's own page pads its line, because another's might hold anything."""
    lines = [row.page_ids[: row.position // page_tokens + 1] for row in rows]
    longest = max(map(len, lines))
    return [page for line in lines for page in (*line, *line[:1] * (longest - len(line)))]


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
