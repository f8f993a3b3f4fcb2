"""The bookkeeping of rows that draft, in plain torch. A CUDA graph can hold all of it.

Legend: `R` rows, `N` lines of a verified row, `S` state slots, `K` longest draft, `D` hidden width, `M` pages of
a row, `F` fields of a row's settings, `U` random numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_nn.kernels.sample.settings import NUM_ROW_FIELDS, UNIFORM


@dataclass(frozen=True)
class DraftRows:
    """Where the rows of a drafting pass stand, in buffers that stay where they are; integers are int64."""

    # The newest token, its position, and the hidden state of the token before it.
    token_ids_R: torch.Tensor
    positions_R: torch.Tensor
    hidden_RD: torch.Tensor
    # Live slots, -1 for a padding row; lines of the page table; tokens that the row's pages have room for.
    slots_R: torch.Tensor
    table_rows_R: torch.Tensor
    room_R: torch.Tensor
    # Of the next draft: its random number among the row's, and its place among the drafts.
    column_R: torch.Tensor
    place_R: torch.Tensor
    # How the next draft is drawn, float64, and what the host has sent: settings, then random numbers.
    settings_RF: torch.Tensor
    numbers_RF: torch.Tensor


@dataclass(frozen=True)
class VerifiedRows:
    """Rows whose verification has been drawn, of which there may be fewer than a pass has room for."""

    # What each line has drawn, and how many lines stand.
    drawn_RN: torch.Tensor
    accepted_R: torch.Tensor
    # Of the first line: position and page table, at a distance of N.
    positions_T: torch.Tensor
    table_rows_T: torch.Tensor
    slots_R: torch.Tensor
    room_R: torch.Tensor


def accept_lines(
    token_ids_RN: torch.Tensor, drawn_RN: torch.Tensor, num_new_R: torch.Tensor, out_R: torch.Tensor
) -> None:
    """How many lines of each row stand; see the package."""
    places = torch.arange(1, token_ids_RN.shape[1], device=token_ids_RN.device)
    is_drawn = (drawn_RN[:, :-1] == token_ids_RN[:, 1:]) & (places < num_new_R[:, None])
    out_R.copy_(1 + is_drawn.long().cumprod(1).sum(1))


def begin_drafts_(
    rows: DraftRows, verified: VerifiedRows, lines_SND: torch.Tensor, line_S: torch.Tensor
) -> None:
    """Go on behind what was verified; see the package."""
    accepted_R, slots_R = verified.accepted_R, verified.slots_R
    count, num_lines = verified.drawn_RN.shape
    last_R = accepted_R - 1
    line_S[slots_R] = last_R
    rows.slots_R[count:].fill_(-1)
    rows.room_R[count:].zero_()
    rows.column_R.zero_()
    rows.token_ids_R[:count] = verified.drawn_RN.gather(1, last_R[:, None])[:, 0]
    rows.positions_R[:count] = verified.positions_T[::num_lines][:count] + accepted_R
    rows.slots_R[:count] = slots_R
    rows.table_rows_R[:count] = verified.table_rows_T[::num_lines][:count]
    rows.room_R[:count] = verified.room_R
    rows.column_R[:count] = last_R
    rows.hidden_RD[:count] = lines_SND[slots_R, last_R]
    rows.place_R.zero_()
    rows.settings_RF.copy_(rows.numbers_RF[:, :NUM_ROW_FIELDS])
    _take_uniforms(rows)


def draft_places(
    positions_R: torch.Tensor,
    room_R: torch.Tensor,
    table_rows_R: torch.Tensor,
    lines_SM: torch.Tensor,
    page_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's token goes and how far it reads; see the package."""
    has_room = positions_R < room_R
    page_R = (positions_R // page_tokens).clamp(0, lines_SM.shape[1] - 1)
    slots_R = lines_SM[table_rows_R, page_R].long() * page_tokens + positions_R % page_tokens
    return torch.where(has_room, slots_R, -1), torch.where(has_room, positions_R + 1, 0)


def end_draft_(rows: DraftRows, hidden_RD: torch.Tensor, ids_SK: torch.Tensor) -> None:
    """Keep the drafts and go on behind them; see the package."""
    ids_SK[rows.slots_R, rows.place_R] = rows.token_ids_R
    rows.hidden_RD.copy_(hidden_RD)
    for number in (rows.positions_R, rows.column_R, rows.place_R):
        number += 1
    _take_uniforms(rows)


def _take_uniforms(rows: DraftRows) -> None:
    """The random numbers of the next drafts; behind the last one there is nothing to draw."""
    uniforms_RU = rows.numbers_RF[:, NUM_ROW_FIELDS:]
    column_R1 = rows.column_R.clamp_max(uniforms_RU.shape[1] - 1)[:, None]
    rows.settings_RF[:, UNIFORM] = uniforms_RU.gather(1, column_R1)[:, 0]
