"""The head's log-probabilities in chunks, recomputed in the backward pass, in plain torch.

The full `[T, vocabulary]` matrix never exists: neither kept for the backward pass nor
made at once. With logits `l = h W^T / temperature`, `p = softmax(l)`:

    d logprob(target) / d l_j = [j = target] - p_j
    d entropy / d l_j         = -p_j (log p_j + entropy)

Legend: `T` tokens, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_LOGITS = 2**25  # most logits at once: 128 MiB of float32


def token_logprobs(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    inverse_temperature_T: torch.Tensor,
    chunk_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies; see the package's public function."""
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS // head_weight_VD.shape[0])
    return _TokenLogprobs.apply(  # type: ignore[no-any-return]
        hidden_TD, head_weight_VD, targets_T, inverse_temperature_T, chunk_tokens
    )


def entropy_hidden_grad(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    inverse_temperature_T: torch.Tensor,
    entropies_T: torch.Tensor,
    entropy_grads_T: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor:
    """What the entropies' gradients give to the hidden states, from the logits made again."""
    hidden_grad = torch.empty_like(hidden_TD)
    for start in range(0, hidden_TD.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        log_p = _log_softmax(hidden_TD[part], head_VD, inverse_temperature_T[part])
        factors = -log_p.exp() * (log_p + entropies_T[part, None])
        factors.mul_((entropy_grads_T * inverse_temperature_T)[part, None])
        hidden_grad[part] = (factors.to(head_VD.dtype) @ head_VD).to(hidden_TD.dtype)
    return hidden_grad


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
