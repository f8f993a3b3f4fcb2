"""Tokens on the device, by live slot: a step is fed from here before the host has read them.

Legend: `S` state slots, `R` rows, `N` sampled rows, or lines of a verify row, `K` longest draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_engine.model import StepLayout, to_device


class SampledIds:
    """For each live state slot the token drawn last for its sequence.

    Slot -1 is that of padding rows: one more place at the end, which nobody reads.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._ids_S = torch.zeros(num_slots + 1, dtype=torch.long, device=device)

    def feed_(self, layout: StepLayout) -> None:
        """Put the tokens of decode rows that name none into `layout.token_ids_T`."""
        if layout.decode is None:
            return
        self.feed_rows_(layout.token_ids_T[: layout.num_decode_rows], layout.decode.delta.ring_slots_R)

    def feed_rows_(self, token_ids_R: torch.Tensor, slots_R: torch.Tensor) -> None:
        """Put the drawn tokens of the rows' slots where `token_ids_R` is -1. A graph can hold it."""
        torch.where(token_ids_R < 0, self._ids_S[slots_R], token_ids_R, out=token_ids_R)

    def keep_rows(self, slots_N: torch.Tensor, token_ids_N: torch.Tensor) -> None:
        """Remember the tokens drawn for these slots. A graph can hold it."""
        self._ids_S[slots_N] = token_ids_N


class DraftIds:
    """For each live state slot the drafts made last for its sequence; slot -1 as above."""

    def __init__(self, num_slots: int, max_draft_tokens: int, device: torch.device) -> None:
        self.ids_SK = torch.zeros((num_slots + 1, max_draft_tokens), dtype=torch.long, device=device)

    def feed_lines_(self, token_ids_RN: torch.Tensor, slots_R: torch.Tensor) -> None:
        """Put the drafts of the rows' slots where `token_ids_RN` is -1. A graph can hold it."""
        lines = token_ids_RN[:, 1:]
        drafts = self.ids_SK[slots_R, : lines.shape[1]]
        lines.copy_(torch.where(lines < 0, drafts, lines))

    def read(self, slots: Sequence[int]) -> list[list[int]]:
        """The slots' drafts on the host, once the step that makes them has ended."""
        return self.ids_SK[to_device(slots, self.ids_SK.device, torch.long)].tolist()  # type: ignore[no-any-return]
