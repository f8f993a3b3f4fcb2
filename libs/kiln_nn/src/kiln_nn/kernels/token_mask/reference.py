"""Forbidding tokens in plain torch.

Legend: `R` rows, `V` vocabulary, `M` masked rows, `W` words of 32 tokens.
"""

from __future__ import annotations

import torch


def mask_tokens_(logits_RV: torch.Tensor, rows_M: torch.Tensor, bits_MW: torch.Tensor) -> torch.Tensor:
    """Set logits to -inf where the bit is 0; see the package."""
    logits_MV = logits_RV[rows_M]
    places = torch.arange(32, device=bits_MW.device, dtype=torch.int32)
    is_allowed_MV = ((bits_MW[:, :, None] >> places) & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    logits_RV[rows_M] = logits_MV.masked_fill(~is_allowed_MV, -torch.inf)
    return logits_MV.logsumexp(dim=-1)
