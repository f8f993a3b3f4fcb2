"""Top-k, top-p and min-p as one number per row: the smallest logit that may still be drawn.

The three apply in that order, each to what the one before left: top-k keeps the k best, top-p
the fewest best whose probability within those reaches p, min-p what is at least p times as
likely as the best. Tokens that tie with the last one kept are kept.

Papers: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, arXiv 1904.09751); Nguyen et al.
2024 (min-p, arXiv 2407.01082). Legend: `R` rows, `V` vocabulary, `F` fields, `C` candidates.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.sample.settings import INVERSE_TEMPERATURE, LOG_MIN_P, TOP_K, TOP_P

# Most rows of text keep their top-p mass within this many tokens; sorting more costs more.
_FIRST_CANDIDATES = 1024


def truncates(rows_RF: torch.Tensor) -> torch.Tensor:
    """Whether each row leaves out any token, bool `[R]`; one that takes the best has no need to."""
    sorts = (rows_RF[:, TOP_K] > 0) | (rows_RF[:, TOP_P] < 1.0)
    return (rows_RF[:, INVERSE_TEMPERATURE] > 0) & (sorts | (rows_RF[:, LOG_MIN_P] > -torch.inf))


def thresholds(scaled_RV: torch.Tensor, rows_RF: torch.Tensor) -> torch.Tensor:
    """The smallest kept logit of each row, `[R, 1]`; -inf where a row keeps everything.

    `scaled_RV` are logits less the row's best, divided by the temperature.
    """
    vocab_size = scaled_RV.shape[1]
    lowest = rows_RF[:, LOG_MIN_P, None].to(scaled_RV.dtype)
    top_k, top_p = rows_RF[:, TOP_K], rows_RF[:, TOP_P]
    (sorting,) = ((top_k > 0) | (top_p < 1.0)).nonzero(as_tuple=True)
    if len(sorting):
        top_k = torch.where((top_k > 0) & (top_k < vocab_size), top_k, float(vocab_size)).long()
        best = _smallest_of_best(scaled_RV[sorting], top_k[sorting, None], top_p[sorting, None])
        lowest = lowest.index_copy(0, sorting, torch.maximum(lowest[sorting], best))
    return lowest


def _smallest_of_best(scaled_RV: torch.Tensor, k_R1: torch.Tensor, p_R1: torch.Tensor) -> torch.Tensor:
    """The last logit that top-k and then top-p keep, `[R, 1]`."""
    vocab_size = scaled_RV.shape[1]
    bounded = k_R1[k_R1 < vocab_size]
    num_candidates = int(bounded.max()) if len(bounded) else 0
    if len(bounded) < len(k_R1):
        num_candidates = min(vocab_size, max(num_candidates, _FIRST_CANDIDATES))
    # Mass of what top-k leaves, for rows where it leaves everything; the others' is in the candidates.
    whole = scaled_RV.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    while True:
        candidates = scaled_RV.topk(num_candidates, dim=-1).values
        in_top_k = torch.arange(num_candidates, device=scaled_RV.device) < k_R1
        weights = candidates.double().exp() * in_top_k
        cumulative = weights.cumsum(dim=-1)
        is_inside = k_R1 <= num_candidates
        needed = p_R1 * torch.where(is_inside, cumulative[:, -1:], whole)
        if num_candidates == vocab_size or bool((is_inside | (cumulative[:, -1:] >= needed)).all()):
            # Kept while what stands before has not reached p: the best always, and the one that crosses.
            is_kept = in_top_k & (cumulative - weights < needed)
            last = is_kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
            return candidates.gather(1, last)
        num_candidates = min(vocab_size, num_candidates * 16)
