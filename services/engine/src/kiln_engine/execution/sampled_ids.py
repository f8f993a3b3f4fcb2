"""The tokens drawn last, on the device: a step is fed from here before the host has read them.

Legend: `S` state slots, `R` decode rows, `N` sampled rows.
"""

from __future__ import annotations

import torch

from kiln_engine.model import StepLayout


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
