"""Where the decode rows of a step find and leave what they remember.

Legend: `R` decode rows, `M` most pages of any row of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import DecodeRow
from kiln_engine.model.index_lists import IndexLists, StoreShape
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaRows

# Most tokens whose keys and values attention copies out of the pages at once (padding included)
# for decode rows: without a bound, one long row would pad all of its neighbours to its length.
MOST_GATHERED_TOKENS = 65_536


@dataclass(frozen=True)
class AttentionGroup:
    """Decode rows whose pages are read together, each line padded to the longest."""

    rows: torch.Tensor  # among the decode rows
    page_table_RM: torch.Tensor
    context_lengths_R: torch.Tensor


@dataclass(frozen=True)
class DecodeLayout:
    """Everything the decode rows look up."""

    # Every row is in one of them; a single group has the rows in their order.
    attention: tuple[AttentionGroup, ...]
    delta: DeltaRows


class DecodeLists:
    """Collects the decode rows' numbers, and makes their layout once they are on the device."""

    def __init__(self, lists: IndexLists, rows: Sequence[DecodeRow], shape: StoreShape) -> None:
        self._groups = [
            (
                lists.add(group),
                lists.add(_padded_pages([rows[i] for i in group], shape.page_tokens)),
                lists.add([rows[i].position + 1 for i in group]),
            )
            for group in _attention_groups([row.position + 1 for row in rows])
        ]
        commits = [NO_SLOT if row.state_commit_slot is None else row.state_commit_slot for row in rows]
        self._delta = [
            lists.add([row.state_read_slot for row in rows]),
            lists.add([row.state_slot for row in rows]),
            lists.add([row.position % shape.page_tokens for row in rows]),
            lists.add(commits),
        ]

    def layout(self, parts: Sequence[torch.Tensor]) -> DecodeLayout:
        return DecodeLayout(
            attention=tuple(
                AttentionGroup(parts[rows], parts[table].view(len(parts[rows]), -1), parts[contexts])
                for rows, table, contexts in self._groups
            ),
            delta=DeltaRows(*(parts[number] for number in self._delta)),
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
