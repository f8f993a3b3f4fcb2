"""The bookkeeping of rows that draft: the kernels beside plain torch, to the bit."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.draft_rows import DraftRows, VerifiedRows, accept_lines, end_draft_, reference
from kiln_nn.kernels.sample.settings import NUM_ROW_FIELDS, UNIFORM
from tests.support.triton_kernels import (
    CAPABILITIES,
    DEVICE,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    run_under_interpreter,
    starts_interpreter,
)

NUM_SLOTS, MAX_DRAFTS, PAGE_TOKENS = 6, 3, 16
SIZES = [(1, 1, 2), (4, 4, 4), (5, 2, 4), (70, 66, 2)]


def _kernel():
    from kiln_nn.kernels.draft_rows import triton

    return triton


def _generator(num_rows: int) -> torch.Generator:
    return torch.Generator().manual_seed(num_rows)


def _rows(
    num_rows: int, width: int = 24, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> DraftRows:
    """Rows somewhere in the middle of drafting, the last one padding."""
    generator = _generator(num_rows)

    def draw(most: int) -> torch.Tensor:
        return torch.randint(most, (num_rows,), generator=generator).to(device)

    slots = torch.arange(num_rows) % (NUM_SLOTS - 1)
    slots[-1] = -1
    numbers = torch.rand(num_rows, NUM_ROW_FIELDS + 2 * MAX_DRAFTS, generator=generator, dtype=torch.float64)
    return DraftRows(
        token_ids_R=draw(50),
        positions_R=draw(60),
        hidden_RD=torch.randn(num_rows, width, generator=generator).to(device, dtype),
        slots_R=slots.to(device),
        table_rows_R=draw(NUM_SLOTS),
        room_R=draw(64),
        column_R=draw(2 * MAX_DRAFTS),
        place_R=draw(MAX_DRAFTS),
        settings_RF=numbers[:, :NUM_ROW_FIELDS].contiguous().to(device) + 1,
        numbers_RF=numbers.to(device),
    )


def _verified(num_rows: int, num_lines: int, device: str = DEVICE) -> VerifiedRows:
    generator = _generator(num_rows + 1)

    def draw(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape or (num_rows,), generator=generator).to(device)

    # Each slot at most once, padding rows with none.
    slots = torch.where(torch.arange(num_rows) < NUM_SLOTS - 1, torch.arange(num_rows), -1)
    return VerifiedRows(
        drawn_RN=draw(50, num_rows, num_lines),
        accepted_R=1 + draw(num_lines) * (slots >= 0).to(device),
        positions_T=draw(60, num_rows * num_lines),
        table_rows_T=draw(NUM_SLOTS, num_rows * num_lines),
        slots_R=slots.to(device),
        room_R=draw(64),
    )


def _lines(width: int = 24, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    lines = torch.randn(NUM_SLOTS, 1 + MAX_DRAFTS, width, generator=_generator(0)).to(device, dtype)
    return lines, torch.zeros(NUM_SLOTS, dtype=torch.long, device=device)


def _copied(rows: DraftRows) -> DraftRows:
    return replace(rows, **{field.name: getattr(rows, field.name).clone() for field in fields(rows)})


def _assert_same(ours: DraftRows, expected: DraftRows) -> None:
    for field in fields(expected):
        assert torch.equal(getattr(ours, field.name), getattr(expected, field.name)), field.name


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize(("num_rows", "num_lines"), [(1, 2), (70, 4), (3, 8)])
def test_as_many_lines_stand_as_in_plain_torch(num_rows, num_lines):
    generator = _generator(num_lines)
    tokens, drawn = (
        torch.randint(2, (num_rows, num_lines), generator=generator).to(DEVICE) for _ in range(2)
    )
    num_new = torch.randint(1, num_lines + 1, (num_rows,), generator=generator).to(DEVICE)
    ours, expected = torch.zeros_like(num_new), torch.zeros_like(num_new)
    _kernel().accept_lines(tokens, drawn, num_new, ours)
    reference.accept_lines(tokens, drawn, num_new, expected)
    assert torch.equal(ours, expected)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("capacity", "num_rows", "num_lines"), SIZES)
def test_drafts_begin_where_verification_ended(capacity, num_rows, num_lines, dtype):
    rows, verified = _rows(capacity, dtype=dtype), _verified(num_rows, num_lines)
    (lines, line), expected = _lines(dtype=dtype), _copied(rows)
    expected_line = line.clone()
    _kernel().begin_drafts_(rows, verified, lines, line)
    reference.begin_drafts_(expected, verified, lines, expected_line)
    _assert_same(rows, expected)
    assert torch.equal(line[:-1], expected_line[:-1])


@on_triton
@pytest.mark.parametrize("num_rows", [1, 5, 70])
def test_drafts_go_where_the_page_table_says_while_there_is_room(num_rows):
    rows = _rows(num_rows)
    pages = torch.randint(100, (NUM_SLOTS, 4), generator=_generator(3)).to(DEVICE, torch.int32)
    args = (rows.positions_R, rows.room_R, rows.table_rows_R, pages, PAGE_TOKENS)
    for ours, expected in zip(_kernel().draft_places(*args), reference.draft_places(*args), strict=True):
        assert torch.equal(ours, expected)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_draft_is_kept_and_the_next_one_prepared(num_rows, dtype):
    rows, expected = _rows(num_rows, dtype=dtype), _rows(num_rows, dtype=dtype)
    hidden = torch.randn(num_rows, 24, generator=_generator(5)).to(DEVICE, dtype)
    ids = torch.zeros(NUM_SLOTS, MAX_DRAFTS, dtype=torch.long, device=DEVICE)
    expected_ids = ids.clone()
    _kernel().end_draft_(rows, hidden, ids)
    reference.end_draft_(expected, hidden, expected_ids)
    _assert_same(rows, expected)
    assert torch.equal(ids, expected_ids)


def test_the_number_that_a_draft_is_drawn_with_is_that_of_its_token():
    rows, verified = _rows(2, device="cpu"), _verified(2, 4, device="cpu")
    lines, line = _lines(device="cpu")
    reference.begin_drafts_(rows, verified, lines, line)
    column = int(verified.accepted_R[0]) - 1
    for number in range(2):
        assert rows.settings_RF[0, UNIFORM] == rows.numbers_RF[0, NUM_ROW_FIELDS + column + number]
        ids = torch.zeros(NUM_SLOTS, MAX_DRAFTS, dtype=torch.long)
        end_draft_(rows, rows.hidden_RD, ids)
        assert ids[0, number] == rows.token_ids_R[0]


def test_other_shapes_are_refused():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ShapeMismatch):
        accept_lines(tokens, tokens[:, :2], tokens[:, 0])


@only_outside_interpreter
@needs_triton
def test_they_compile_for_every_supported_gpu():
    with compiling_instead_of_launching() as compiled:
        for dtype in (torch.float32, torch.bfloat16):
            rows, verified = _rows(4, 2560, dtype, "cpu"), _verified(4, 4, "cpu")
            lines, line = _lines(2560, dtype, "cpu")
            pages = torch.zeros(NUM_SLOTS, 4, dtype=torch.int32)
            _kernel().accept_lines(verified.drawn_RN, verified.drawn_RN, verified.accepted_R, line[:4])
            _kernel().begin_drafts_(rows, verified, lines, line)
            _kernel().draft_places(rows.positions_R, rows.room_R, rows.table_rows_R, pages, PAGE_TOKENS)
            ids = torch.zeros(NUM_SLOTS, MAX_DRAFTS, dtype=torch.long)
            _kernel().end_draft_(rows, rows.hidden_RD, ids)
    assert len(compiled) == 2 * 4 * len(CAPABILITIES)
