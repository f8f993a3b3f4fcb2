"""The numbers of a step that travel to the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kiln_engine.domain import (
    BatchPlan,
    DecodeRow,
    PrefillChunk,
    RowSampling,
    SamplingParams,
    StateCheckpoint,
)
from kiln_engine.model import page_table
from kiln_engine.model.decode_layout import decode_fields, decode_layout
from kiln_engine.model.page_table import PageTable
from kiln_engine.model.prefill_layout import PrefillCapacity, prefill_numbers
from kiln_engine.model.step_layout import begun_pages, build_layout, moved_to_slots
from kiln_engine.model.store_shape import StoreShape
from kiln_nn.kernels.paged_attention import reference

SHAPE = StoreShape(page_tokens=16, num_line_pages=8, num_state_slots=10)
SAMPLING = RowSampling(SamplingParams(), 0)
CPU = torch.device("cpu")


def row(slot: int, position: int, *, commit_slot: int | None = None, token_id: int | None = 7) -> DecodeRow:
    pages = tuple(range(20, 21 + position // 16))
    return DecodeRow(slot, token_id, position, pages, slot, slot, commit_slot, (), SAMPLING)


def chunk(slot: int, start: int, num_tokens: int, *, sampled: bool = True, **fields) -> PrefillChunk:
    pages = tuple(range(40 + 10 * slot, 40 + 10 * slot + -(-(start + num_tokens) // 16)))
    tokens = tuple(range(100, 100 + num_tokens))
    read = slot if start else None
    checkpoints = fields.get("checkpoints", ())
    return PrefillChunk(
        slot, tokens, start, pages, read, slot, checkpoints, (), SAMPLING if sampled else None
    )


def test_a_decode_row_says_where_its_token_and_its_memory_lie():
    layout = decode_layout(torch.from_numpy(decode_fields([row(3, 37), row(4, 31, commit_slot=4)], SHAPE)))
    assert layout.token_slots_R.tolist() == [22 * 16 + 5, 21 * 16 + 15]
    assert layout.context_lengths_R.tolist() == [38, 32]
    assert layout.table_rows_R.tolist() == [3, 4]
    assert layout.delta.lengths_R.tolist() == [5, 15]
    assert layout.delta.commit_slots_R.tolist() == [-1, 4]


def test_rows_that_fill_up_a_batch_touch_nothing():
    layout = decode_layout(torch.from_numpy(decode_fields([row(3, 37)], SHAPE, capacity=4)))
    assert layout.num_rows == 4
    padding = slice(1, 4)
    assert layout.context_lengths_R[padding].tolist() == [0] * 3
    for slots in (layout.token_slots_R, layout.delta.ring_slots_R, layout.kept_slots_R):
        assert slots[padding].tolist() == [-1] * 3
    assert layout.table_rows_R[padding].eq(SHAPE.spare_line).all()


def test_a_batch_with_a_capacity_lists_the_same_chunks_as_one_without():
    chunks = [
        chunk(1, 32, 40, checkpoints=(StateCheckpoint(48, 8),)),
        chunk(2, 0, 16, sampled=False),
        chunk(5, 0, 3),
    ]
    exact, padded = prefill_numbers(chunks, SHAPE), prefill_numbers(chunks, SHAPE, PrefillCapacity(128, 8))
    few = exact.layout(torch.from_numpy(exact.flat))
    many = padded.layout(torch.from_numpy(padded.flat))
    assert (few.num_tokens, many.num_tokens) == (59, 128)
    for name in ("token_ids_T", "positions_T", "token_slots_T"):
        assert getattr(many, name)[:59].tolist() == getattr(few, name).tolist()
    assert many.token_slots_T[59:].eq(-1).all()
    assert few.sample_tokens_N.tolist() == [39, 58]
    assert few.kept_slots_N.tolist() == [1, 5]
    assert many.sample_tokens_N.tolist() == [39, 58, *[0] * 6]
    assert many.kept_slots_N.tolist() == [1, 5, *[-1] * 6]
    assert many.delta.cu_seqlens_N1.tolist() == [0, 40, 56, *[59] * 6]
    assert few.attention.context_lengths_N.tolist() == [72, 16, 3]
    assert few.table_rows_N.tolist() == [1, 2, 5]
    # The state after the first page of the first chunk is kept.
    assert few.delta.checkpoint_slots_G.tolist() == [8, -1, -1, -1, -1]


def test_a_graph_of_one_capacity_serves_every_step_that_fits():
    capacity = PrefillCapacity(64, 4)
    sizes = {
        prefill_numbers(chunks, SHAPE, capacity).section_sizes
        for chunks in ([], [chunk(1, 0, 1)], [chunk(n, 0, 16) for n in range(4)], [chunk(1, 16, 64)])
    }
    assert len(sizes) == 1


def lines_after(*plans: BatchPlan) -> list[list[int]]:
    table = PageTable(SHAPE, CPU)
    for plan in plans:
        table.update(plan)
    return table.lines_SM.tolist()


def test_every_row_finds_its_pages_in_the_line_of_its_slot():
    lines = lines_after(BatchPlan(1, (row(3, 37),), (chunk(2, 32, 20),)))
    assert lines[2] == [60, 61, 62, 63, 0, 0, 0, 0]
    assert lines[3] == [20, 21, 22, 0, 0, 0, 0, 0]


def test_pages_that_gave_way_to_others_are_found_where_they_are_now():
    """As when a page turns out to be in the prefix tree already."""
    other = dataclasses.replace(row(3, 49), page_ids=(20, 7, 22, 23))
    lines = lines_after(BatchPlan(1, (row(3, 48),)), BatchPlan(2, (other,)))
    assert lines[3][:4] == [20, 7, 22, 23]
    assert lines_after(BatchPlan(1, (row(3, 48),)), BatchPlan(2, (row(3, 64),)))[3][:5] == [
        20,
        21,
        22,
        23,
        24,
    ]


def test_pages_that_could_not_be_sent_are_sent_with_the_next_plan(monkeypatch):
    def out_of_memory(*_) -> None:
        raise MemoryError

    table, plan = PageTable(SHAPE, CPU), BatchPlan(1, (row(3, 37),))
    with monkeypatch.context() as broken:
        broken.setattr(page_table, "to_device", out_of_memory)
        with pytest.raises(MemoryError):
            table.update(plan)
    table.update(plan)
    assert table.lines_SM[3].tolist() == [20, 21, 22, 0, 0, 0, 0, 0]


def test_pages_never_run_into_the_line_of_another_slot():
    with pytest.raises(AssertionError):
        PageTable(SHAPE, CPU).update(BatchPlan(1, (row(3, 8 * 16),)))


def test_a_row_that_goes_on_in_another_slot_takes_its_line_along():
    moving = BatchPlan(1, (row(3, 31, commit_slot=6), row(4, 31, commit_slot=4)))
    assert moved_to_slots(moving) == [6]
    assert build_layout(moving, SHAPE, CPU).kept_slots.tolist() == [6, 4]
    moved = dataclasses.replace(row(6, 32), page_ids=(20, 21, 22))
    assert lines_after(moving, BatchPlan(2, (moved,)))[6][:3] == [20, 21, 22]


def test_pages_that_a_step_begins_without_filling_them():
    plan = BatchPlan(1, (row(3, 37), row(4, 48)), (chunk(2, 32, 20), chunk(5, 0, 16)))
    assert begun_pages(plan, SHAPE.page_tokens) == [23, 63]


@pytest.mark.parametrize("most_gathered", [65_536, 1])
def test_one_long_row_does_not_pad_its_neighbours_to_its_length(
    monkeypatch: pytest.MonkeyPatch, most_gathered: int
):
    monkeypatch.setattr(reference, "MOST_GATHERED_TOKENS", most_gathered)
    lengths = [700, 250_000, 0, 900, *[1000 + i for i in range(125)]]
    groups = reference.row_groups(lengths)
    assert sorted(r for rows, _ in groups for r in rows) == [i for i, length in enumerate(lengths) if length]
    for rows, longest in groups:
        assert longest == max(lengths[r] for r in rows)
        assert longest * len(rows) <= most_gathered or len(rows) == 1
