"""Log-probabilities and entropies of given tokens, straight from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kiln_nn.kernels.checks import accumulation_dtype, check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu
from kiln_nn.kernels.logprobs import reference

__all__ = ["TokenLogprobs", "token_logprobs"]


class TokenLogprobs(NamedTuple):
    """Natural logarithms; float32 (float64 for float64 hidden states)."""

    logprobs_T: torch.Tensor
    entropies_T: torch.Tensor


def token_logprobs(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    chunk_tokens: int | None = None,
) -> TokenLogprobs:
    """Log-probability of `targets_T[t]` and the distribution's entropy, given `hidden_TD[t]`.

    `targets_T[t]` is the token that follows position t. The cross-entropy is `-logprobs_T`.
    `temperature` divides the logits; a tensor `[T]` gives every token its own.

    Gradients flow into `hidden_TD`, and into the head only if it requires them.
    """
    num_tokens, width = hidden_TD.shape
    check_shape("head", head_weight_VD, (None, width))
    check_shape("targets", targets_T, (num_tokens,))
    dtype = accumulation_dtype(hidden_TD)
    inverse = torch.as_tensor(temperature, dtype=dtype, device=hidden_TD.device).reciprocal()
    inverse_T = inverse.expand(num_tokens)
    run = reference.token_logprobs
    if may_train_on_gpu("logprobs", hidden_TD, head_weight_VD, targets_T):
        from kiln_nn.kernels.logprobs import triton

        if triton.supports(hidden_TD, head_weight_VD):
            run = triton.token_logprobs
    return TokenLogprobs(*run(hidden_TD, head_weight_VD, targets_T, inverse_T, chunk_tokens))
