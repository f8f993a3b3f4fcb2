"""Where the decode rows of a step find and leave what they remember.

Everything a row looks up is one number, so a step's rows are one small matrix `[fields, R]`: it
travels in one copy, and a captured graph reads it where the copy before its launch has put it.

Legend: `R` decode rows (padding included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kiln_engine.domain.plan import DecodeRow
from kiln_engine.model.store_shape import StoreShape
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaRows

# The rows of the matrix, in order.
_FIELDS = (
    "token_ids",
    "positions",
    "token_slots",
    "context_lengths",
    "table_rows",
    "read_slots",
    "ring_slots",
    "lengths",
    "commit_slots",
    "kept_slots",
)
NUM_DECODE_FIELDS = len(_FIELDS)


@dataclass(frozen=True)
class DecodeLayout:
    """Views of one `[fields, R]` int64 matrix on the device."""

    # -1 where the token is the one drawn last for the row's live slot.
    token_ids_R: torch.Tensor
    positions_R: torch.Tensor
    # Where the token's key and value go; -1 for a padding row.
    token_slots_R: torch.Tensor
    # The token included; 0 for a padding row.
    context_lengths_R: torch.Tensor
    # The row's line of the page table.
    table_rows_R: torch.Tensor
    delta: DeltaRows
    # The live slot after the step, with which the token drawn stays; -1 for a padding row.
    kept_slots_R: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.token_ids_R.shape[0]


def decode_layout(fields_FR: torch.Tensor) -> DecodeLayout:
    """The layout that a matrix made by `decode_fields` describes."""
    field = dict(zip(_FIELDS, fields_FR.unbind(0), strict=True))
    return DecodeLayout(
        token_ids_R=field["token_ids"],
        positions_R=field["positions"],
        token_slots_R=field["token_slots"],
        context_lengths_R=field["context_lengths"],
        table_rows_R=field["table_rows"],
        delta=DeltaRows(field["read_slots"], field["ring_slots"], field["lengths"], field["commit_slots"]),
        kept_slots_R=field["kept_slots"],
    )


def decode_fields(rows: Sequence[DecodeRow], shape: StoreShape, capacity: int | None = None) -> np.ndarray:
    """The rows' numbers as int64 `[fields, capacity]`; rows behind the last one touch nothing."""
    capacity = len(rows) if capacity is None else capacity
    numbers = []
    for row in rows:
        page, place = divmod(row.position, shape.page_tokens)
        slot, commit = row.state_slot, row.state_commit_slot
        numbers.append(
            (
                -1 if row.token_id is None else row.token_id,
                row.position,
                row.page_ids[page] * shape.page_tokens + place,
                row.position + 1,
                slot,
                row.state_read_slot,
                slot,
                place,
                NO_SLOT if commit is None else commit,
                slot if commit is None else commit,
            )
        )
    padding = (0, 0, -1, 0, shape.spare_line, NO_SLOT, NO_SLOT, 0, NO_SLOT, NO_SLOT)
    numbers.extend([padding] * (capacity - len(rows)))
    return np.ascontiguousarray(np.array(numbers, dtype=np.int64).reshape(capacity, NUM_DECODE_FIELDS).T)
