"""Rows to draw from, easy and adversarial, with an oracle in float64 that sorts everything.

Legend: `R` rows, `V` vocabulary, `F` fields, `E` edits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kiln_nn.kernels.sample import settings


@dataclass(frozen=True)
class Rule:
    """One row's settings; edits are (token, bias, penalty, addend)."""

    temperature: float = 1.0
    uniform: float = 0.5
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    edits: tuple[tuple[int, float, float, float], ...] = field(default=())


def tables(rules: Sequence[Rule], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """The rules as `rows_RF` and `edits_EF`; the table of edits is longer than what is in it."""
    rows, edits = [], []
    for row, rule in enumerate(rules):
        first = len(edits)
        edits.extend((row, *edit) for edit in sorted(rule.edits))
        inverse = 1 / rule.temperature if rule.temperature > 0 else 0.0
        log_min_p = math.log(rule.min_p) if rule.min_p > 0 else -math.inf
        rows.append((inverse, rule.uniform, rule.top_k, rule.top_p, log_min_p, first, len(edits)))
    edits.extend([(0, 0, math.nan, math.nan, math.nan)] * 3)
    options = {"dtype": torch.float64, "device": device}
    return torch.tensor(rows, **options), torch.tensor(edits, **options)


def logits_by_shape(vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of logits that are hard for somebody."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocab_size, generator=generator)
    peak = noise.clone()
    peak[vocab_size // 3] = 60.0
    alone = torch.full((vocab_size,), -math.inf)
    alone[vocab_size - 1] = 3.0
    few = torch.full((vocab_size,), -math.inf)
    few[:: max(1, vocab_size // 7)] = noise[:: max(1, vocab_size // 7)]
    crowded = noise - 12
    crowded[100:400] = noise[100:400]  # all that counts stands in a few blocks
    return {
        "like text": noise * 3,
        "flat": noise,
        "nearly uniform": noise * 1e-3,
        "all equal": torch.full((vocab_size,), 2.5),
        "ties": (noise * 4).round() / 2,
        "bfloat16": (noise * 3).bfloat16().float(),
        "one huge": peak,
        "one finite": alone,
        "few finite": few,
        "far below zero": noise - 1e4,
        "wide": noise * 1e3,
        "crowded": crowded,
    }


RULES = {
    "greedy": Rule(temperature=0.0),
    "plain": Rule(),
    "cold": Rule(temperature=0.3),
    "hot": Rule(temperature=2.5),
    "top-k 1": Rule(top_k=1),
    "top-k 20": Rule(temperature=0.8, top_k=20),
    "top-k 700": Rule(top_k=700),
    "top-k of all": Rule(top_k=10**6),
    "top-p small": Rule(top_p=1e-4),
    "top-p": Rule(temperature=0.7, top_p=0.9),
    "top-p large": Rule(temperature=1.3, top_p=0.999),
    "top-k and top-p": Rule(temperature=0.6, top_k=20, top_p=0.95),
    "large top-k and top-p": Rule(top_k=900, top_p=0.8),
    "min-p": Rule(min_p=0.05),
    "min-p 1": Rule(min_p=1.0),
    "all three": Rule(temperature=1.1, top_k=300, top_p=0.97, min_p=1e-3),
}


@dataclass(frozen=True)
class Expected:
    """A row's exact distribution: probabilities of what is kept, and log-probabilities at temperature 1."""

    probabilities_V: torch.Tensor
    raw_logprobs_V: torch.Tensor
    best_logit: float
    edited_V: torch.Tensor


def expected(logits_V: torch.Tensor, rule: Rule) -> Expected:
    """By sorting, in float64. Scaling by the temperature is in float32, where ties are decided."""
    edited = logits_V.float().clone()
    for token, bias, penalty, addend in rule.edits:
        logit = edited[token] + bias
        edited[token] = (logit / penalty if logit > 0 else logit * penalty) + addend
    inverse = 1 / rule.temperature if rule.temperature > 0 else 1.0
    scaled = ((edited - edited.max()) * inverse).float()
    threshold = -math.inf
    ranked = scaled.sort(descending=True).values
    if 0 < rule.top_k < len(ranked):
        ranked = ranked[: rule.top_k]
        threshold = float(ranked[-1])
    if rule.top_p < 1:
        upto = ranked.double().exp().cumsum(0)
        before = torch.cat([upto.new_zeros(1), upto[:-1]])
        threshold = float(ranked[max(1, int((before < rule.top_p * upto[-1]).sum())) - 1])
    if rule.min_p > 0:
        threshold = max(threshold, float(torch.tensor(math.log(rule.min_p)).float()))
    weights = torch.where(scaled >= threshold, scaled.double().exp(), 0.0)
    raw = logits_V.double().log_softmax(0)
    return Expected(weights / weights.sum(), raw, float(edited.max()), edited)


def misplaced_mass(token: int, row: Expected, uniform: float) -> float:
    """How much of the row's mass lies between the draw and the token's own share; 0 where it is right."""
    upto = row.probabilities_V.cumsum(0)
    low, high = float(upto[token] - row.probabilities_V[token]), float(upto[token])
    return max(0.0, low - uniform, uniform - high)


def check_draw(drawn_F: Sequence[float], logits_V: torch.Tensor, rule: Rule, tolerance: float) -> None:
    """Assert that a row was drawn as its rule says, up to so much misplaced mass."""
    token, logprob, sampled = int(drawn_F[settings.DRAWN_TOKEN]), drawn_F[1], drawn_F[2]
    assert 0 <= token < len(logits_V)
    row = expected(logits_V, rule)
    assert logprob - float(row.raw_logprobs_V[token]) == _near_zero(row)
    if rule.temperature == 0:
        assert float(row.edited_V[token]) == row.best_logit
        assert sampled == 0.0
        return
    assert float(row.probabilities_V[token]) > 0, "the token was cut off"
    assert misplaced_mass(token, row, rule.uniform) <= tolerance
    assert sampled - math.log(float(row.probabilities_V[token])) == _near_zero(row)


def _near_zero(row: Expected) -> object:
    """1e-5, and float32's rounding of the logits where they are large."""
    import pytest

    largest = float(row.edited_V[row.edited_V.isfinite()].abs().max())
    return pytest.approx(0.0, abs=1e-5 + largest * 2**-22)
