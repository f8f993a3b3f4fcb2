"""Where the verify rows of a step find and leave what they remember.

Legend: `R` rows, `N` lines of each, `T` = R * N lines in all, row after row (padding included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from kiln_engine.domain.plan import VerifyRow
from kiln_engine.model.carried_hidden import IN_PASS, NOT_KEPT
from kiln_engine.model.store_shape import StoreShape
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaRows

_LINE_FIELDS = ("token_ids", "positions", "token_slots", "context_lengths", "table_rows", "carried_slots")
_ROW_FIELDS = ("read_slots", "ring_slots", "lengths", "fold_slots", "num_new", "live_slots", "room")


@dataclass(frozen=True)
class VerifyLayout:
    """Views of one flat int64 tensor on the device."""

    num_lines: int
    # -1 where the draft is the one that the device has made for the row's live slot.
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    # Where the line's key and value go; -1 for a padding line.
    token_slots_T: torch.Tensor
    # The line included; 0 for a padding line.
    context_lengths_T: torch.Tensor
    table_rows_T: torch.Tensor
    # Where the hidden state of the token before each is found, as CarriedHidden says it.
    carried_slots_T: torch.Tensor
    # `commit_slots` are those that full pages are folded to, before the lines.
    delta: DeltaRows
    # Lines in use; 1 for a padding row.
    num_new_R: torch.Tensor
    # Where the rows live after the step; -1 for a padding row.
    live_slots_R: torch.Tensor
    # Tokens that the row's pages have room for; 0 for a padding row.
    room_R: torch.Tensor

    @property
    def token_ids_RN(self) -> torch.Tensor:
        return self.token_ids_T.view(-1, self.num_lines)


def verify_layout(numbers: torch.Tensor, num_lines: int) -> VerifyLayout:
    """The layout that an array made by `verify_numbers` describes."""
    num_rows = numbers.shape[0] // (num_lines * len(_LINE_FIELDS) + len(_ROW_FIELDS))
    lines, rows = numbers.split((num_rows * num_lines * len(_LINE_FIELDS), num_rows * len(_ROW_FIELDS)))
    line = dict(zip(_LINE_FIELDS, lines.view(len(_LINE_FIELDS), -1).unbind(0), strict=True))
    row = dict(zip(_ROW_FIELDS, rows.view(len(_ROW_FIELDS), -1).unbind(0), strict=True))
    return VerifyLayout(
        num_lines=num_lines,
        token_ids_T=line["token_ids"],
        positions_T=line["positions"],
        token_slots_T=line["token_slots"],
        context_lengths_T=line["context_lengths"],
        table_rows_T=line["table_rows"],
        carried_slots_T=line["carried_slots"],
        delta=DeltaRows(row["read_slots"], row["ring_slots"], row["lengths"], row["fold_slots"]),
        num_new_R=row["num_new"],
        live_slots_R=row["live_slots"],
        room_R=row["room"],
    )


def verify_numbers(
    rows: Sequence[VerifyRow], shape: StoreShape, num_lines: int, capacity: int | None = None
) -> np.ndarray:
    """The rows' numbers, int64: fields of the lines, then of the rows; what lies behind them touches nothing."""
    # Lists: the device waits for this, and numpy's calls for each row would take twice as long.
    token_ids: list[int] = []
    positions: list[int] = []
    token_slots: list[int] = []
    context_lengths: list[int] = []
    table_rows: list[int] = []
    carried_slots: list[int] = []
    of_rows: list[tuple[int, ...]] = []
    page_tokens, spare_line = shape.page_tokens, shape.spare_line
    for row in rows:
        num_new, page_ids, slot = row.num_lines, row.page_ids, row.state_slot
        drafts = row.draft_token_ids
        own = range(row.position, row.position + num_new)
        unused = [0] * (num_lines - num_new)
        token_ids += [row.token_id, *([-1] * row.num_drafts if drafts is None else drafts), *unused]
        positions += [*own, *unused]
        token_slots += [page_ids[place // page_tokens] * page_tokens + place % page_tokens for place in own]
        token_slots += [-1] * len(unused)
        context_lengths += [*range(own.start + 1, own.stop + 1), *unused]
        table_rows += [slot] * num_new + [spare_line] * len(unused)
        carried_slots += [slot, *[IN_PASS] * row.num_drafts, *[NOT_KEPT] * len(unused)]
        of_rows.append(
            (
                row.state_read_slot,
                slot,
                row.position % page_tokens + page_tokens * (row.state_fold_slot is not None),
                NO_SLOT if row.state_fold_slot is None else row.state_fold_slot,
                num_new,
                row.live_slot,
                len(page_ids) * page_tokens,
            )
        )
    num_padding = (len(rows) if capacity is None else capacity) - len(rows)
    of_rows += [(NO_SLOT, NO_SLOT, 0, NO_SLOT, 1, NO_SLOT, 0)] * num_padding
    padding = num_padding * num_lines
    return np.array(
        [
            *(*token_ids, *[0] * padding),
            *(*positions, *[0] * padding),
            *(*token_slots, *[-1] * padding),
            *(*context_lengths, *[0] * padding),
            *(*table_rows, *[spare_line] * padding),
            *(*carried_slots, *[NOT_KEPT] * padding),
            *chain.from_iterable(zip(*of_rows, strict=True)),
        ],
        dtype=np.int64,
    )
