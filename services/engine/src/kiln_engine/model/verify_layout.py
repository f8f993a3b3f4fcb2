"""Where the verify rows of a step find and leave what they remember.

Legend: `R` rows, `N` lines of each, `T` = R * N lines in all, row after row (padding included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    capacity = len(rows) if capacity is None else capacity
    lines = np.zeros((len(_LINE_FIELDS), capacity, num_lines), dtype=np.int64)
    lines[2], lines[4], lines[5] = -1, shape.spare_line, NOT_KEPT
    of_rows = np.full((len(_ROW_FIELDS), capacity), NO_SLOT, dtype=np.int64)
    of_rows[2], of_rows[4], of_rows[6] = 0, 1, 0
    page_tokens = shape.page_tokens
    for index, row in enumerate(rows):
        num_new, is_folded = row.num_lines, row.state_fold_slot is not None
        positions = np.arange(row.position, row.position + num_new)
        pages = np.array(row.page_ids)[positions // page_tokens]
        drafts = row.draft_token_ids
        lines[0, index, :num_new] = (row.token_id, *([-1] * row.num_drafts if drafts is None else drafts))
        lines[1, index, :num_new] = positions
        lines[2, index, :num_new] = pages * page_tokens + positions % page_tokens
        lines[3, index, :num_new] = positions + 1
        lines[4, index, :num_new] = row.state_slot
        lines[5, index, :num_new] = (row.state_slot, *[IN_PASS] * row.num_drafts)
        of_rows[:, index] = (
            row.state_read_slot,
            row.state_slot,
            row.position % page_tokens + page_tokens * is_folded,
            NO_SLOT if row.state_fold_slot is None else row.state_fold_slot,
            num_new,
            row.live_slot,
            len(row.page_ids) * page_tokens,
        )
    return np.concatenate([lines.ravel(), of_rows.ravel()])
