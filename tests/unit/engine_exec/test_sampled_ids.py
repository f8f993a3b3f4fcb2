"""Tokens that stay on the device between two steps."""

from __future__ import annotations

import torch

from kiln_engine.domain import BatchPlan, DecodeRow, PrefillChunk, RowSampling, SamplingParams
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.model.step_layout import build_layout
from kiln_engine.model.store_shape import StoreShape

SHAPE = StoreShape(page_tokens=16, num_line_pages=4, num_state_slots=8)
SAMPLING = RowSampling(SamplingParams(), 0)


def row(slot: int, token_id: int | None, *, position: int = 3, commit_slot: int | None = None) -> DecodeRow:
    return DecodeRow(slot, token_id, position, (slot,), slot, slot, commit_slot, (), SAMPLING)


def test_rows_without_a_token_are_fed_what_was_drawn_for_their_slot_and_the_others_their_own():
    ids = SampledIds(8, torch.device("cpu"))
    chunk = PrefillChunk(9, (1, 2), 0, (5,), None, 5, (), (), SAMPLING)
    silent = PrefillChunk(8, (1,) * 16, 0, (7,), None, 7, (), (), None)
    first = BatchPlan(1, (row(2, 40, position=15, commit_slot=6), row(3, 41)), (silent, chunk))
    ids.keep_rows(build_layout(first, SHAPE, torch.device("cpu")).kept_slots, torch.tensor([100, 101, 102]))
    # The first row moved on to the slot that it committed to.
    second = BatchPlan(2, (row(6, None), row(3, 77), row(5, None)))
    layout = build_layout(second, SHAPE, torch.device("cpu"))
    ids.feed_(layout)
    assert layout.token_ids_T.tolist() == [100, 77, 102]
