"""The bookkeeping of rows that draft in Triton, a launch for each of its parts.

Takes int64 numbers, float64 settings, pages in any integer format, and hidden states of one format, all
with a contiguous last dimension. Nothing is computed with but integers; the rest is copied, so what comes
out is the reference's to the bit.

Launched the usual way: what comes behind may not begin before they have ended.

Source: our own. Legend: as in `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.draft_rows.reference import DraftRows, VerifiedRows
from kiln_nn.kernels.sample import settings

_ROWS = 64
_NUM_FIELDS = tl.constexpr(settings.NUM_ROW_FIELDS)
_UNIFORM = tl.constexpr(settings.UNIFORM)


@triton.jit(do_not_specialize=["num_rows"])
def _accept_kernel(
    token_ids_ptr, drawn_ptr, num_new_ptr, out_ptr, num_rows, token_stride, drawn_stride,
    NUM_LINES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    num_new = tl.load(num_new_ptr + rows, mask=mask, other=0)
    # 1 while every line before has drawn the next one's token.
    stands = mask.to(tl.int64)
    count = stands
    for line in tl.static_range(1, NUM_LINES):
        token = tl.load(token_ids_ptr + rows * token_stride + line, mask=mask, other=0)
        drawn = tl.load(drawn_ptr + rows * drawn_stride + (line - 1), mask=mask, other=0)
        stands = stands * ((token == drawn) & (num_new > line)).to(tl.int64)
        count += stands
    tl.store(out_ptr + rows, count, mask=mask)


@triton.jit(do_not_specialize=["num_verified"])
def _begin_kernel(
    token_ids_ptr, positions_ptr, hidden_ptr, slots_ptr, table_rows_ptr, room_ptr, column_ptr, place_ptr,
    settings_ptr, numbers_ptr,
    drawn_ptr, accepted_ptr, from_positions_ptr, from_table_rows_ptr, from_slots_ptr, from_room_ptr,
    lines_ptr, line_ptr,
    num_verified, num_slots, num_carried, numbers_stride, hidden_stride,
    NUM_LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One program per row there is room for."""
    row = tl.program_id(0).to(tl.int64)
    fields = tl.arange(0, FIELDS)
    numbers = numbers_ptr + row * numbers_stride
    sent = tl.load(numbers + fields, mask=fields < _NUM_FIELDS, other=0.0)
    is_verified = row < num_verified
    # Of a padding row nothing is read; its token and position stay.
    accepted = tl.load(accepted_ptr + row, mask=is_verified, other=1)
    last = accepted - 1
    slot = tl.load(from_slots_ptr + row, mask=is_verified, other=-1)
    kept = tl.where(slot < 0, num_slots - 1, slot)
    token = tl.load(drawn_ptr + row * NUM_LINES + last, mask=is_verified, other=0)
    position = tl.load(from_positions_ptr + row * NUM_LINES, mask=is_verified, other=0)
    table_row = tl.load(from_table_rows_ptr + row * NUM_LINES, mask=is_verified, other=0)
    room = tl.load(from_room_ptr + row, mask=is_verified, other=0)
    tl.store(token_ids_ptr + row, token, mask=is_verified)
    tl.store(positions_ptr + row, position + accepted, mask=is_verified)
    tl.store(table_rows_ptr + row, table_row, mask=is_verified)
    tl.store(line_ptr + kept, last, mask=is_verified)
    tl.store(slots_ptr + row, slot)
    tl.store(room_ptr + row, room)
    tl.store(column_ptr + row, last)
    tl.store(place_ptr + row, last * 0)
    uniform = tl.load(numbers + _NUM_FIELDS + last)
    out = tl.where(fields == _UNIFORM, uniform, sent)
    tl.store(settings_ptr + row * _NUM_FIELDS + fields, out, mask=fields < _NUM_FIELDS)
    cols = tl.arange(0, BLOCK_D)
    in_width = (cols < WIDTH) & is_verified
    hidden = tl.load(lines_ptr + (kept * num_carried + last) * WIDTH + cols, mask=in_width, other=0.0)
    tl.store(hidden_ptr + row * hidden_stride + cols, hidden, mask=in_width)


@triton.jit(do_not_specialize=["num_rows"])
def _places_kernel(
    positions_ptr, room_ptr, table_rows_ptr, lines_ptr, slots_ptr, lengths_ptr,
    num_rows, num_pages, lines_stride,
    PAGE_TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    position = tl.load(positions_ptr + rows, mask=mask, other=0)
    has_room = mask & (position < tl.load(room_ptr + rows, mask=mask, other=0))
    table_row = tl.load(table_rows_ptr + rows, mask=mask, other=0)
    index = position // PAGE_TOKENS
    is_listed = has_room & (index < num_pages)
    page = tl.load(lines_ptr + table_row * lines_stride + index, mask=is_listed, other=0).to(tl.int64)
    slot = page * PAGE_TOKENS + position % PAGE_TOKENS
    tl.store(slots_ptr + rows, tl.where(has_room, slot, -1), mask=mask)
    tl.store(lengths_ptr + rows, tl.where(has_room, position + 1, 0), mask=mask)


@triton.jit(do_not_specialize=["num_uniforms"])
def _end_kernel(
    token_ids_ptr, positions_ptr, hidden_ptr, slots_ptr, column_ptr, place_ptr, settings_ptr, numbers_ptr,
    from_hidden_ptr, ids_ptr,
    num_slots, num_drafts, num_uniforms, numbers_stride, hidden_stride, from_hidden_stride,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    kept = tl.where(slot < 0, num_slots - 1, slot)
    place = tl.load(place_ptr + row)
    tl.store(ids_ptr + kept * num_drafts + place, tl.load(token_ids_ptr + row), mask=place < num_drafts)
    position, column = tl.load(positions_ptr + row), tl.load(column_ptr + row) + 1
    tl.store(place_ptr + row, place + 1)
    tl.store(positions_ptr + row, position + 1)
    tl.store(column_ptr + row, column)
    next_column = tl.minimum(column, num_uniforms - 1)
    uniform = tl.load(numbers_ptr + row * numbers_stride + _NUM_FIELDS + next_column)
    tl.store(settings_ptr + row * _NUM_FIELDS + _UNIFORM, uniform)
    cols = tl.arange(0, BLOCK_D)
    hidden = tl.load(from_hidden_ptr + row * from_hidden_stride + cols, mask=cols < WIDTH, other=0.0)
    tl.store(hidden_ptr + row * hidden_stride + cols, hidden, mask=cols < WIDTH)


def accept_lines(
    token_ids_RN: torch.Tensor, drawn_RN: torch.Tensor, num_new_R: torch.Tensor, out_R: torch.Tensor
) -> None:
    """As the reference."""
    num_rows, num_lines = token_ids_RN.shape
    _accept_kernel[(triton.cdiv(num_rows, _ROWS),)](
        token_ids_RN, drawn_RN, num_new_R, out_R, num_rows, token_ids_RN.stride(0), drawn_RN.stride(0),
        NUM_LINES=num_lines, ROWS=_ROWS, num_warps=2,
    )  # fmt: skip


def begin_drafts_(
    rows: DraftRows, verified: VerifiedRows, lines_SND: torch.Tensor, line_S: torch.Tensor
) -> None:
    """As the reference."""
    num_rows, width = rows.hidden_RD.shape
    num_verified, num_lines = verified.drawn_RN.shape
    _begin_kernel[(num_rows,)](
        rows.token_ids_R, rows.positions_R, rows.hidden_RD, rows.slots_R, rows.table_rows_R, rows.room_R,
        rows.column_R, rows.place_R, rows.settings_RF, rows.numbers_RF,
        verified.drawn_RN, verified.accepted_R, verified.positions_T, verified.table_rows_T,
        verified.slots_R, verified.room_R,
        lines_SND, line_S,
        num_verified, lines_SND.shape[0], lines_SND.shape[1], rows.numbers_RF.stride(0),
        rows.hidden_RD.stride(0),
        NUM_LINES=num_lines, WIDTH=width, FIELDS=triton.next_power_of_2(settings.NUM_ROW_FIELDS),
        **_block(width),
    )  # fmt: skip


def draft_places(
    positions_R: torch.Tensor,
    room_R: torch.Tensor,
    table_rows_R: torch.Tensor,
    lines_SM: torch.Tensor,
    page_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference."""
    num_rows = positions_R.shape[0]
    slots_R, lengths_R = torch.empty_like(positions_R), torch.empty_like(positions_R)
    _places_kernel[(triton.cdiv(num_rows, _ROWS),)](
        positions_R, room_R, table_rows_R, lines_SM, slots_R, lengths_R,
        num_rows, lines_SM.shape[1], lines_SM.stride(0),
        PAGE_TOKENS=page_tokens, ROWS=_ROWS, num_warps=2,
    )  # fmt: skip
    return slots_R, lengths_R


def end_draft_(rows: DraftRows, hidden_RD: torch.Tensor, ids_SK: torch.Tensor) -> None:
    """As the reference."""
    num_rows, width = hidden_RD.shape
    _end_kernel[(num_rows,)](
        rows.token_ids_R, rows.positions_R, rows.hidden_RD, rows.slots_R, rows.column_R, rows.place_R,
        rows.settings_RF, rows.numbers_RF, hidden_RD, ids_SK,
        ids_SK.shape[0], ids_SK.shape[1], rows.numbers_RF.shape[1] - settings.NUM_ROW_FIELDS,
        rows.numbers_RF.stride(0), rows.hidden_RD.stride(0), hidden_RD.stride(0),
        WIDTH=width, **_block(width),
    )  # fmt: skip


def _block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": max(1, min(8, block // 256))}
