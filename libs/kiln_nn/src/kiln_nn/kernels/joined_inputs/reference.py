"""Embeddings and hidden states side by side, in plain torch.

Legend: `T` tokens of a pass, `S` slots, `N` lines of a slot, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kiln_nn.kernels.rms_norm import reference as norms

# The token before is the one before it in the same pass.
IN_PASS = -2
# The token before has no hidden state at hand: it is taken for zeros.
NOT_KEPT = -1


@dataclass(frozen=True)
class CarriedLines:
    """Hidden states that earlier passes left: of each slot one of several lines counts."""

    lines_SND: torch.Tensor
    # The line of each slot that counts, int64.
    line_S: torch.Tensor
    # For each token the slot with the hidden state of the token before it, or IN_PASS, or NOT_KEPT; int64.
    slots_T: torch.Tensor


def hidden_before(carried: CarriedLines, hidden_TD: torch.Tensor) -> torch.Tensor:
    """The hidden state of the token before each of a pass, whose own are `hidden_TD`."""
    slots_T = carried.slots_T
    known_TD = torch.where((slots_T == IN_PASS)[:, None], hidden_TD.roll(1, 0), 0)
    kept_T = slots_T.clamp_min(0)
    return torch.where((slots_T >= 0)[:, None], carried.lines_SND[kept_T, carried.line_S[kept_T]], known_TD)


def joined_inputs(
    embedding_VD: torch.Tensor,
    token_ids_T: torch.Tensor,
    hidden_TD: torch.Tensor,
    embedding_norm_D: torch.Tensor,
    hidden_norm_D: torch.Tensor,
    eps: float,
    *,
    carried: CarriedLines | None = None,
) -> torch.Tensor:
    """The two normed, side by side; see the package."""
    if carried is not None:
        hidden_TD = hidden_before(carried, hidden_TD)
    embedded_TD = norms.rms_norm(F.embedding(token_ids_T, embedding_VD), embedding_norm_D, eps, offset=1.0)
    return torch.cat([embedded_TD, norms.rms_norm(hidden_TD, hidden_norm_D, eps, offset=1.0)], dim=-1)
