"""Where lines find their pages and rings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kiln_engine.domain import BatchPlan
from kiln_engine.execution.verify_graphs import verify_ladder
from kiln_engine.model.step_layout import begun_pages
from kiln_engine.model.store_shape import StoreShape
from kiln_engine.model.verify_layout import verify_layout, verify_numbers
from tests.unit.engine_exec.test_verifying import make_row

SHAPE = StoreShape.of(page_tokens=4, max_model_len=64, num_state_slots=7)


def test_lines_cross_pages_and_padding_touches_nothing():
    crossing = replace(make_row(8, 9), position=7, page_ids=(5, 3, 1), state_slot=2, state_read_slot=2)
    folding = replace(
        make_row(), position=9, page_ids=(6, 0, 4), state_slot=1, state_read_slot=1, state_fold_slot=1
    )
    numbers = verify_numbers([crossing, folding], SHAPE, num_lines=3, capacity=3)
    layout = verify_layout(torch.from_numpy(numbers), 3)
    assert layout.token_ids_RN.tolist() == [[2, 8, 9], [2, 0, 0], [0, 0, 0]]
    assert layout.positions_T.tolist() == [7, 8, 9, 9, 0, 0, 0, 0, 0]
    # Page 3's last place, then page 1's first two.
    assert layout.token_slots_T.tolist() == [15, 4, 5, 17, -1, -1, -1, -1, -1]
    assert layout.context_lengths_T.tolist() == [8, 9, 10, 10, 0, 0, 0, 0, 0]
    assert layout.delta.lengths_R.tolist() == [3, 1 + 4, 0]
    assert layout.delta.commit_slots_R.tolist() == [-1, 1, -1]
    assert layout.num_new_R.tolist() == [3, 1, 1]
    assert layout.live_slots_R.tolist() == [2, 1, -1]


def test_drafts_of_the_device_are_left_open():
    numbers = verify_numbers([replace(make_row(1, 2, on_device=True), page_ids=(0, 1))], SHAPE, num_lines=3)
    assert verify_layout(torch.from_numpy(numbers), 3).token_ids_RN.tolist() == [[2, -1, -1]]


@pytest.mark.parametrize(("position", "begun"), [(3, [8]), (4, [8]), (5, []), (7, [9]), (1, [])])
def test_pages_are_begun_by_the_lines_that_are_first_in_them(position: int, begun: list[int]):
    row = replace(make_row(1, 2), position=position, page_ids=(7, 8, 9))
    assert begun_pages(BatchPlan(1, verify_rows=(row,)), 4) == begun


def test_the_ladder_holds_every_batch_that_may_guess():
    assert verify_ladder(256, 256, 3) == {2: [1, 2, 4, 8, 16, 32, 64, 128], 4: [1, 2, 4, 8, 16, 32, 64]}
    assert verify_ladder(12, 64, 3) == {2: [1, 2, 4, 8, 12], 4: [1, 2, 4, 8, 12]}
    assert verify_ladder(1, 32, 1) == {2: [1]}
    assert verify_ladder(256, 256, 0) == {}
