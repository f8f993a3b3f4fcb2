"""The bookkeeping of rows that draft: which lines stand, where drafts begin, where they go, what comes next.

Each is one launch on a GPU; in plain torch it is one for every number that moves, and with one row a
launch costs as much as the layer's smallest matrix.
"""

from __future__ import annotations

from types import ModuleType

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.draft_rows import reference
from kiln_nn.kernels.draft_rows.reference import DraftRows, VerifiedRows

__all__ = ["DraftRows", "VerifiedRows", "accept_lines", "begin_drafts_", "draft_places", "end_draft_"]


def accept_lines(
    token_ids_RN: torch.Tensor,
    drawn_RN: torch.Tensor,
    num_new_R: torch.Tensor,
    out_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many lines of each row stand: the first, and each whose token the line before drew.

    `num_new_R` lines of a row are in use. All int64; the result lies in `out_R` if it is given.
    """
    check_shape("drawn", drawn_RN, tuple(token_ids_RN.shape))
    check_shape("lines in use", num_new_R, (token_ids_RN.shape[0],))
    out_R = torch.empty_like(num_new_R) if out_R is None else out_R
    _implementation(token_ids_RN, drawn_RN, num_new_R, out_R).accept_lines(
        token_ids_RN, drawn_RN, num_new_R, out_R
    )
    return out_R


def begin_drafts_(
    rows: DraftRows, verified: VerifiedRows, lines_SND: torch.Tensor, line_S: torch.Tensor
) -> None:
    """Let the rows go on behind the last token that stands, with the hidden state of the line that drew it.

    That is one of the row's slot in `lines_SND`, and `line_S` says from then on which. Rows there is
    room for beyond those become padding. Slot -1 is the last one.
    """
    check_shape("carried lines", lines_SND, (line_S.shape[0], None, rows.hidden_RD.shape[1]))
    _implementation(rows.token_ids_R, rows.hidden_RD, lines_SND).begin_drafts_(
        rows, verified, lines_SND, line_S
    )


def draft_places(
    positions_R: torch.Tensor,
    room_R: torch.Tensor,
    table_rows_R: torch.Tensor,
    lines_SM: torch.Tensor,
    page_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each row's token in the cache, and how many it reads, its own included: int64 `[R]`.

    `lines_SM` are pages by line of the table. Where a row has no room for it, they are -1 and 0.
    """
    args = (positions_R, room_R, table_rows_R, lines_SM)
    places: tuple[torch.Tensor, torch.Tensor] = _implementation(*args).draft_places(*args, page_tokens)
    return places


def end_draft_(rows: DraftRows, hidden_RD: torch.Tensor, ids_SK: torch.Tensor) -> None:
    """Keep the drafts just drawn (`rows.token_ids_R`) with their slots, and let the rows go on behind them.

    `hidden_RD` are the hidden states that drew them. Slot -1 is the last one.
    """
    check_shape("hidden", hidden_RD, tuple(rows.hidden_RD.shape))
    _implementation(rows.token_ids_R, hidden_RD, ids_SK).end_draft_(rows, hidden_RD, ids_SK)


def _implementation(*tensors: torch.Tensor) -> ModuleType:
    """The kernels where these tensors are on a GPU; they take any formats."""
    if takes_triton(*tensors) and all(tensor.stride(-1) == 1 for tensor in tensors):
        from kiln_nn.kernels.draft_rows import triton

        return triton
    return reference
