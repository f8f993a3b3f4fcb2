"""What the multi-token-prediction layer reads of a token: its embedding and a hidden state, both normed."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.joined_inputs import reference
from kiln_nn.kernels.joined_inputs.reference import IN_PASS, NOT_KEPT, CarriedLines

__all__ = ["IN_PASS", "NOT_KEPT", "CarriedLines", "joined_inputs"]


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
    """The tokens' embeddings and hidden states, each normed with `1 + weight`, side by side: `[T, 2 D]`.

    The hidden state is that of the same row; with `carried` that of the token before, which is found
    in `hidden_TD` or among what earlier passes left.

    Returns: the format of `hidden_TD`.
    """
    num_tokens, width = hidden_TD.shape
    check_shape("token ids", token_ids_T, (num_tokens,))
    check_shape("embedding", embedding_VD, (None, width))
    check_shape("embedding norm", embedding_norm_D, (width,))
    check_shape("hidden norm", hidden_norm_D, (width,))
    if carried is not None:
        check_shape("carried slots", carried.slots_T, (num_tokens,))
        check_shape("carried lines", carried.lines_SND, (None, None, width))
    args = (embedding_VD, token_ids_T, hidden_TD, embedding_norm_D, hidden_norm_D)
    if takes_triton(*args):
        from kiln_nn.kernels.joined_inputs import triton

        if triton.takes(*args, carried):
            return triton.joined_inputs(*args, eps, carried=carried)
    return reference.joined_inputs(*args, eps, carried=carried)
