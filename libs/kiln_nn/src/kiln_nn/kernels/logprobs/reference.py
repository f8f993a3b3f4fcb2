"""The head's log-probabilities in chunks, recomputed in the backward pass, in plain torch.

The full `[T, vocabulary]` matrix never exists: neither kept for the backward pass nor
made at once. With logits `l = h W^T / temperature`, `p = softmax(l)`:

    d logprob(target) / d l_j = [j = target] - p_j
    d entropy / d l_j         = -p_j (log p_j + entropy)

Legend: `T` tokens, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype, check_shape

_CHUNK_LOGITS = 2**25  # most logits at once: 128 MiB of float32


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
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS // head_weight_VD.shape[0])
    return TokenLogprobs(*_TokenLogprobs.apply(hidden_TD, head_weight_VD, targets_T, inverse_T, chunk_tokens))


def _log_softmax(hidden: torch.Tensor, head: torch.Tensor, inverse_temperature: torch.Tensor) -> torch.Tensor:
    hidden = hidden.to(head.dtype)
    if head.is_cuda and head.dtype in (torch.bfloat16, torch.float16):
        # The product is accumulated in float32 anyway: take it before it is rounded.
        logits = torch.mm(hidden, head.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(hidden, head).to(inverse_temperature.dtype)
    return torch.log_softmax(logits.mul_(inverse_temperature[:, None]), dim=-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        inverse_temperature: torch.Tensor,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.empty_like(inverse_temperature, memory_format=torch.contiguous_format)
        entropies = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            log_p = _log_softmax(hidden[part], head, inverse_temperature[part])
            logprobs[part] = log_p.gather(-1, targets[part, None])[:, 0]
            entropies[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, head, targets, inverse_temperature, entropies)
        ctx.chunk_tokens = chunk_tokens
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, head, targets, inverse_temperature, entropies = ctx.saved_tensors
        logprob_grads, entropy_grads = grads
        hidden_grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        head_grad = None
        if ctx.needs_input_grad[1]:
            head_grad = torch.zeros_like(head, dtype=inverse_temperature.dtype)
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            log_p = _log_softmax(hidden[part], head, inverse_temperature[part])
            by_entropy = entropy_grads[part, None] * (log_p + entropies[part, None])
            logit_grads = (log_p.exp() * (by_entropy + logprob_grads[part, None])).neg_()
            logit_grads.scatter_add_(1, targets[part, None], logprob_grads[part, None])
            logit_grads.mul_(inverse_temperature[part, None])
            if hidden_grad is not None:
                hidden_grad[part] = (logit_grads.to(head.dtype) @ head).to(hidden.dtype)
            if head_grad is not None:
                head_grad += logit_grads.t() @ hidden[part].to(logit_grads.dtype)
        if head_grad is not None:
            head_grad = head_grad.to(head.dtype)
        return hidden_grad, head_grad, None, None, None
