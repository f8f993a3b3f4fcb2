"""Hidden states that wait for the token after theirs: the MTP layer reads both together.

Legend: `T` tokens of a pass, `S` state slots, `N` lines of a row, `R` rows, `D` hidden width.
"""

from __future__ import annotations

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.kernels.draft_rows import DraftRows, VerifiedRows, begin_drafts_
from kiln_nn.kernels.joined_inputs import IN_PASS, NOT_KEPT, CarriedLines

__all__ = ["IN_PASS", "NOT_KEPT", "CarriedHidden", "carried_slot_bytes"]


def carried_slot_bytes(config: ModelConfig, max_draft_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one slot."""
    return (max_draft_tokens + 1) * config.hidden_size * dtype.itemsize + torch.long.itemsize


class CarriedHidden:
    """For each live state slot the hidden states of the lines its sequence computed last.

    A decode row or a chunk leaves one, that of its last token; a verify row leaves one for each of its
    lines, and `accept` says later which of them counts. Slot -1 is that of padding rows: one more
    place at the end, which nobody reads. A graph can hold every call.
    """

    def __init__(
        self, num_slots: int, max_lines: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._lines_SND = torch.zeros((num_slots + 1, max_lines, width), dtype=dtype, device=device)
        # The line of each slot that counts.
        self._line_S = torch.zeros(num_slots + 1, dtype=torch.long, device=device)

    @property
    def num_bytes(self) -> int:
        return self._lines_SND.nbytes + self._line_S.nbytes

    def before(self, slots_T: torch.Tensor) -> CarriedLines:
        """Where the hidden state of the token before each of a pass is: a live slot, IN_PASS, NOT_KEPT."""
        return CarriedLines(self._lines_SND, self._line_S, slots_T)

    def last(self, slots_R: torch.Tensor) -> torch.Tensor:
        """The hidden state that the slots' sequences left, `[R, D]`."""
        return self._lines_SND[slots_R, self._line_S[slots_R]]

    def keep(self, slots_R: torch.Tensor, hidden_RD: torch.Tensor) -> None:
        """Remember the hidden state of each row's only or last token."""
        self._lines_SND[slots_R, 0] = hidden_RD
        self._line_S.index_fill_(0, slots_R, 0)

    def keep_lines(self, slots_R: torch.Tensor, hidden_RND: torch.Tensor) -> None:
        """Remember those of all lines of verify rows; the first counts until `accept` says otherwise."""
        self._lines_SND[slots_R, : hidden_RND.shape[1]] = hidden_RND
        self._line_S.index_fill_(0, slots_R, 0)

    def accept(self, slots_R: torch.Tensor, num_lines_R: torch.Tensor) -> None:
        """The first `num_lines_R` lines of each row, one or more, turned out to be its sequence's tokens."""
        self._line_S[slots_R] = num_lines_R - 1

    def begin_drafts(self, rows: DraftRows, verified: VerifiedRows) -> None:
        """The same, with `rows` going on behind those lines: see `begin_drafts_`."""
        begin_drafts_(rows, verified, self._lines_SND, self._line_S)
