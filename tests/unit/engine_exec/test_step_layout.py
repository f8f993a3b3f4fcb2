"""The index tensors of a step, where their size matters."""

from __future__ import annotations

import torch

from kiln_engine.domain import BatchPlan, DecodeRow, RowSampling, SamplingParams
from kiln_engine.model.decode_layout import MOST_GATHERED_TOKENS
from kiln_engine.model.index_lists import StoreShape
from kiln_engine.model.step_layout import build_layout

SHAPE = StoreShape(page_tokens=16, num_tail_rows=3, ring_capacity=16)


def row(number: int, num_tokens: int) -> DecodeRow:
    num_pages = -(-num_tokens // 16)
    return DecodeRow(
        sequence_id=number,
        token_id=1,
        position=num_tokens - 1,
        page_ids=tuple(range(number, number + num_pages)),
        state_read_slot=number,
        state_slot=number,
        state_commit_slot=None if num_tokens % 16 else number,
        adapter_slots=(),
        sampling=RowSampling(SamplingParams(), 0),
    )


def test_one_long_row_does_not_pad_its_neighbours_to_its_length():
    lengths = [700, 250_000, 900, *[1000 + i for i in range(125)]]
    plan = BatchPlan(1, tuple(row(number, length) for number, length in enumerate(lengths)))
    layout = build_layout(plan, SHAPE, torch.device("cpu"))
    assert layout.decode is not None
    groups = layout.decode.attention
    assert sorted(torch.cat([group.rows for group in groups]).tolist()) == list(range(128))
    for group in groups:
        assert group.context_lengths_R.tolist() == [lengths[i] for i in group.rows.tolist()]
        padded = group.page_table_RM.numel() * 16
        assert padded <= MOST_GATHERED_TOKENS + 16 * len(group.rows) or len(group.rows) == 1
    # The long row is by itself, the others take as few turns as they can.
    assert [len(group.rows) for group in groups] == [1, 58, 61, 8]


def test_rows_that_fit_together_are_read_together():
    plan = BatchPlan(1, tuple(row(number, 40 * number + 1) for number in range(32)))
    layout = build_layout(plan, SHAPE, torch.device("cpu"))
    assert layout.decode is not None
    (group,) = layout.decode.attention
    assert group.rows.tolist() == list(range(32))
