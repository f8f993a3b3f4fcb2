"""Changes to single logits before sampling: bias, banned tokens, penalties.

Few tokens of a row are touched, so each change is a list of (row, token, number) and no tensor
of the vocabulary's size is made for it.

Legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kiln_engine.domain.plan import RowSampling
from kiln_engine.model import to_device


def changes_logits(sampling: RowSampling) -> bool:
    """Whether the row asks for any change here."""
    params = sampling.params
    return bool(sampling.banned_token_ids or params.logit_bias or params.needs_history)


def edit_logits_(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> None:
    """Apply each row's changes in place, in this order: bias, repetition, presence and frequency, bans.

    Repetition divides positive and multiplies negative logits of tokens in prompt or output;
    presence and frequency subtract for tokens of the output, once and per occurrence.
    """
    bias, repetition, subtracted, banned = _Edits(), _Edits(), _Edits(), _Edits()
    for row, sampling in enumerate(rows):
        params = sampling.params
        bias.extend(row, params.logit_bias.items())
        if params.repetition_penalty != 1.0:
            seen = {*sampling.prompt_token_ids, *sampling.output_token_ids}
            repetition.extend(row, ((token, params.repetition_penalty) for token in seen))
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(sampling.output_token_ids)
            subtracted.extend(
                row,
                (
                    (token, -params.presence_penalty - params.frequency_penalty * count)
                    for token, count in counts.items()
                ),
            )
        banned.extend(row, ((token, -math.inf) for token in sampling.banned_token_ids))
    bias.add_to_(logits_RV)
    repetition.scale_down_(logits_RV)
    subtracted.add_to_(logits_RV)
    banned.add_to_(logits_RV)


@dataclass
class _Edits:
    """(row, token, number) triples, each row and token at most once."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def extend(self, row: int, pairs) -> None:
        for token, number in pairs:
            self.rows.append(row)
            self.tokens.append(token)
            self.numbers.append(number)

    def add_to_(self, logits_RV: torch.Tensor) -> None:
        if self.rows:
            places, numbers = self._tensors(logits_RV.device)
            logits_RV[places] += numbers

    def scale_down_(self, logits_RV: torch.Tensor) -> None:
        if self.rows:
            places, penalties = self._tensors(logits_RV.device)
            logits = logits_RV[places]
            logits_RV[places] = torch.where(logits > 0, logits / penalties, logits * penalties)

    def _tensors(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        rows, tokens = to_device([self.rows, self.tokens], device).unbind()
        return (rows, tokens), to_device(self.numbers, device, torch.float32)
