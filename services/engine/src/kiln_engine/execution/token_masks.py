"""The rows of a step that may not draw every token, and which ones they may.

Legend: `R` rows of the step, `M` masked rows, `V` vocabulary, `W` words of 32 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from kiln_engine.domain.output_rules import Allowance
from kiln_engine.domain.plan import RowSampling
from kiln_engine.grammar.matching import MaskWriter, TokenMatcher
from kiln_engine.model import to_device
from kiln_nn.kernels.token_mask import mask_tokens_, num_words

_MOST_THREADS = 8


@dataclass(frozen=True)
class TokenMasks:
    """Which rows are masked, and their bits, on the device."""

    rows_M: torch.Tensor
    bits_MW: torch.Tensor

    def apply_(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Forbid the tokens in place; returns `logsumexp` of the rows as they were, `[M]`."""
        return mask_tokens_(logits_RV, self.rows_M, self.bits_MW)


def token_masks(rows: Sequence[RowSampling], vocab_size: int, device: torch.device) -> TokenMasks | None:
    """The masks of these rows as their constraints stand now, or None where none has one."""
    constrained = [(i, row.constraint.allowance) for i, row in enumerate(rows) if row.constraint is not None]
    masked = [(i, allowance) for i, allowance in constrained if allowance != _EVERYTHING]
    if not masked:
        return None
    bits_MW = torch.empty(
        len(masked), num_words(vocab_size), dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    _fill(bits_MW.numpy(), [allowance for _, allowance in masked])
    rows_M = to_device([i for i, _ in masked], device)
    return TokenMasks(rows_M, bits_MW.to(device, non_blocking=True))


_EVERYTHING = Allowance()


@torch.inference_mode()
def compile_masks(logits_RV: torch.Tensor) -> None:
    """Allow everything once, so that the first grammar of a server finds its kernels."""
    device = logits_RV.device
    bits_MW = torch.full((1, num_words(logits_RV.shape[1])), -1, dtype=torch.int32, device=device)
    TokenMasks(to_device([0], device), bits_MW).apply_(logits_RV)


def _fill(bits_MW: np.ndarray, allowances: Sequence[Allowance]) -> None:
    matchers: list[tuple[int, TokenMatcher]] = []
    for index, allowance in enumerate(allowances):
        if allowance.only is not None:
            bits_MW[index] = 0
            _set(bits_MW[index], allowance.only)
        elif allowance.matcher is None:
            bits_MW[index] = -1
        else:
            assert isinstance(allowance.matcher, TokenMatcher)
            matchers.append((index, allowance.matcher))
    if matchers:
        _writer().write(matchers, bits_MW)
    for index, allowance in enumerate(allowances):
        if allowance.banned_token_ids:
            _ban(bits_MW[index], allowance.banned_token_ids)


@cache
def _writer() -> MaskWriter:
    return MaskWriter(max(1, min((os.cpu_count() or 1) // 2, _MOST_THREADS)))


def _set(bits_W: np.ndarray, token_id: int) -> None:
    bits_W.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)


def _ban(bits_W: np.ndarray, token_ids: frozenset[int]) -> None:
    """Take the tokens out, unless nothing else is left."""
    words = bits_W.view(np.uint32).copy()
    for token_id in token_ids:
        words[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
    if words.any():
        bits_W.view(np.uint32)[:] = words
