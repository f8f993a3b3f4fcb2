"""The tokens drawn last, on the device: a step is fed from here before the host has read them.

Legend: `S` state slots, `N` sampled rows.
"""

from __future__ import annotations

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model import StepLayout


class SampledIds:
    """For each live state slot the token drawn last for its sequence."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._ids_S = torch.zeros(num_slots, dtype=torch.long, device=device)

    def feed_(self, plan: BatchPlan, layout: StepLayout) -> None:
        """Put the tokens of decode rows that name none into `layout.token_ids_T`."""
        if layout.decode is None or all(row.token_id is not None for row in plan.decode_rows):
            return
        known_R = layout.token_ids_T[: layout.num_decode_rows]
        drawn_R = self._ids_S.index_select(0, layout.decode.delta.ring_slots_R)
        known_R.copy_(torch.where(known_R < 0, drawn_R, known_R))

    def keep(self, layout: StepLayout, token_ids_N: torch.Tensor) -> None:
        """Remember what a step drew, in the order of its samples."""
        self._ids_S.index_copy_(0, layout.kept_slots, token_ids_N)
