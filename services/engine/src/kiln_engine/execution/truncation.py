"""Top-k, top-p and min-p as one number per row: the smallest logit that may still be drawn.

The three apply in that order, each to what the one before left: top-k keeps the k best, top-p
the fewest best whose probability within those reaches p, min-p what is at least p times as
likely as the best. Tokens that tie with the last one kept are kept.

Papers: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, arXiv 1904.09751); Nguyen et al.
2024 (min-p, arXiv 2407.01082). Legend: `R` rows, `V` vocabulary, `C` candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kiln_engine.domain.request import SamplingParams
from kiln_engine.model import to_device

# Most rows of text keep their top-p mass within this many tokens; sorting more costs more.
_FIRST_CANDIDATES = 1024


def truncates(params: SamplingParams) -> bool:
    """Whether the row leaves out any token."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def thresholds(scaled_RV: torch.Tensor, rows: Sequence[SamplingParams]) -> torch.Tensor:
    """The smallest kept logit of each row, `[R, 1]`; -inf where a row keeps everything.

    `scaled_RV` are logits already divided by the temperature.
    """
    device, vocab_size = scaled_RV.device, scaled_RV.shape[1]
    best = scaled_RV.amax(dim=-1, keepdim=True)
    lowest = torch.full_like(best, -torch.inf)
    if any(params.min_p > 0.0 for params in rows):
        log_min_p = [math.log(params.min_p) if params.min_p > 0.0 else -math.inf for params in rows]
        lowest = best + to_device(log_min_p, device, best.dtype)[:, None]
    sorting = [i for i, params in enumerate(rows) if params.top_k > 0 or params.top_p < 1.0]
    if sorting:
        top_k = [rows[i].top_k if 0 < rows[i].top_k < vocab_size else vocab_size for i in sorting]
        top_p = [rows[i].top_p for i in sorting]
        index = to_device(sorting, device)
        sorted_lowest = _smallest_of_best(scaled_RV.index_select(0, index), top_k, top_p)
        lowest[index] = torch.maximum(lowest[index], sorted_lowest)
    return lowest


def _smallest_of_best(scaled_RV: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """The last logit that top-k and then top-p keep, `[R, 1]`."""
    device, vocab_size = scaled_RV.device, scaled_RV.shape[1]
    bounded = [k for k in top_k if k < vocab_size]
    num_candidates = max(bounded, default=0)
    if len(bounded) < len(top_k):
        num_candidates = min(vocab_size, max(num_candidates, _FIRST_CANDIDATES))
    k_R1 = to_device(top_k, device)[:, None]
    p_R1 = to_device(top_p, device, torch.float64)[:, None]
    # Mass of what top-k leaves, for rows where it leaves everything; the others' is in the candidates.
    best = scaled_RV.amax(dim=-1, keepdim=True)
    whole = (scaled_RV - best).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    while True:
        candidates = scaled_RV.topk(num_candidates, dim=-1).values
        in_top_k = torch.arange(num_candidates, device=device) < k_R1
        weights = (candidates - best).double().exp() * in_top_k
        cumulative = weights.cumsum(dim=-1)
        is_inside = k_R1 <= num_candidates
        needed = p_R1 * torch.where(is_inside, cumulative[:, -1:], whole)
        if num_candidates == vocab_size or bool((is_inside | (cumulative[:, -1:] >= needed)).all()):
            # Kept while what stands before has not reached p: the best always, and the one that crosses.
            is_kept = in_top_k & (cumulative - weights < needed)
            last = is_kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
            return candidates.gather(1, last)
        num_candidates = min(vocab_size, num_candidates * 16)
