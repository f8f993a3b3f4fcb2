"""Drawing tokens in plain torch. A row that asks for nothing special costs one pass over its logits.

Legend: `R` rows, `V` vocabulary, `E` edits, `F` fields, `B` blocks of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.sample.settings import (
    ADDEND,
    BIAS,
    END_EDIT,
    INVERSE_TEMPERATURE,
    PENALTY,
    ROW,
    TOKEN,
    UNIFORM,
)
from kiln_nn.kernels.sample.truncation import thresholds, truncates

_BLOCK = 256


def draw_tokens(
    logits_RV: torch.Tensor,
    rows_RF: torch.Tensor,
    edits_EF: torch.Tensor,
    tokens_R: torch.Tensor,
    drawn_RF: torch.Tensor,
) -> None:
    """Draw one token per row into `tokens_R` and `drawn_RF`; see the package. Reads back to the host."""
    log_total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    edits_EF = edits_EF[: int(rows_RF[-1, END_EDIT])]
    edited = edit_logits(logits_RV, edits_EF) if len(edits_EF) else logits_RV
    is_greedy_R1 = rows_RF[:, INVERSE_TEMPERATURE, None] == 0
    token_R1, sampled_R1 = None, torch.zeros_like(log_total_R1)
    if not bool(is_greedy_R1.all()):
        token_R1, sampled_R1 = _draw(edited, rows_RF)
    if bool(is_greedy_R1.any()):
        best_R1 = edited.argmax(dim=-1, keepdim=True)
        token_R1 = best_R1 if token_R1 is None else torch.where(is_greedy_R1, best_R1, token_R1)
        sampled_R1 = sampled_R1.masked_fill(is_greedy_R1, 0.0)
    assert token_R1 is not None
    logprob_R1 = logits_RV.gather(1, token_R1) - log_total_R1
    torch.cat([token_R1.double(), logprob_R1.double(), sampled_R1.double()], dim=1, out=drawn_RF)
    tokens_R.copy_(token_R1[:, 0])


def edit_logits(logits_RV: torch.Tensor, edits_EF: torch.Tensor) -> torch.Tensor:
    """The logits with bias, penalty and addend applied to the tokens that the edits name."""
    places = (edits_EF[:, ROW].long(), edits_EF[:, TOKEN].long())
    bias, penalty, addend = (edits_EF[:, field].to(logits_RV.dtype) for field in (BIAS, PENALTY, ADDEND))
    logits = logits_RV[places] + bias
    logits = torch.where(logits > 0, logits / penalty, logits * penalty) + addend
    return logits_RV.index_put(places, logits)


def _draw(edited_RV: torch.Tensor, rows_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token per row and its log-probability under what it was drawn from, each `[R, 1]`."""
    inverse_R1 = rows_RF[:, INVERSE_TEMPERATURE, None]
    inverse_R1 = torch.where(inverse_R1 > 0, inverse_R1, 1.0).to(edited_RV.dtype)
    best_R1 = edited_RV.amax(dim=-1, keepdim=True)
    scaled = (edited_RV - best_R1).mul_(inverse_R1)
    cut_R = truncates(rows_RF)
    if bool(cut_R.all()):
        scaled.masked_fill_(scaled < thresholds(scaled, rows_RF), -torch.inf)
    elif bool(cut_R.any()):
        part = scaled[cut_R]
        scaled[cut_R] = part.masked_fill_(part < thresholds(part, rows_RF[cut_R]), -torch.inf)
    weights = scaled.exp_()
    token_R1, total_R1 = inverse_distribution(weights, rows_RF[:, UNIFORM, None])
    return token_R1, weights.gather(1, token_R1).double().log() - total_R1.log()


def inverse_distribution(weights_RV: torch.Tensor, u_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token whose cumulative weight exceeds `u` times the total, and the total.

    Goes by blocks: sums of blocks first, then the entries of one block, so that only one pass
    reads the vocabulary. A token of weight 0 is never chosen.

    Returns: tokens int64 and totals float64, each `[R, 1]`.
    """
    num_rows, vocab_size = weights_RV.shape
    blocks_RBE = F.pad(weights_RV, (0, -vocab_size % _BLOCK)).view(num_rows, -1, _BLOCK)
    upto_RB = blocks_RBE.sum(dim=-1).double().cumsum(dim=-1)
    total_R1 = upto_RB[:, -1:]
    target_R1 = u_R1 * total_R1
    block_R1 = _first_above(upto_RB, target_R1)
    before_R1 = torch.where(block_R1 > 0, upto_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    entries = blocks_RBE.gather(1, block_R1[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    entry_R1 = _first_above(entries.double().cumsum(dim=-1), target_R1 - before_R1)
    return block_R1 * _BLOCK + entry_R1, total_R1


def _first_above(cumulative_RN: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the target, `[R, 1]`; where rounding left none, of the last rise."""
    first = (cumulative_RN <= target_R1).sum(dim=-1, keepdim=True)
    last_rise = (cumulative_RN < cumulative_RN[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(first, last_rise).clamp_(max=cumulative_RN.shape[1] - 1)
