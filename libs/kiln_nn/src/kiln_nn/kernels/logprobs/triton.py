"""The head's log-probabilities with the gradient of the hidden states made in the same pass, in Triton.

A row's loss reaches its logits only through its log-probability, so the gradient of its hidden state is
one vector times a number that is not known yet: forward makes that vector while the chunk's logits are
there, and backward multiplies. The logits are computed once instead of twice, and two of their three
products remain. With `l` the logits over the temperature and `p = softmax(l)`:

    d logprob(target) / d hidden = sum_j ([j = target] - p_j) W_j / temperature

One program reads a row twice: a running maximum with its sums, then the factors of `W`. Supported:
frozen heads in float32, bf16 or fp16. Error against float64 under the interpreter: below 1e-6 in float32.

Legend: `T` tokens, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kiln_nn.kernels.logprobs import reference

# 1 GiB in float32, and half of that for the factors: fewer rows would leave the second product, whose
# result is only as wide as the hidden state, too few tiles for a large GPU.
_CHUNK_LOGITS = 2**28
_BLOCK = 4096


@triton.jit
def _logprob_rows_kernel(
    logits, targets, inverse_temperatures, logprobs, entropies, factors,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = logits + row * WIDTH
    inverse = tl.load(inverse_temperatures + row)
    target = tl.load(targets + row)
    highest = tl.load(places) * inverse
    total = highest * 0.0
    weighted = highest * 0.0
    for start in tl.range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < WIDTH
        x = tl.load(places + column, mask=mask, other=-float("inf")) * inverse
        higher = tl.maximum(highest, tl.max(x, 0))
        shrink = tl.exp(highest - higher)
        p = tl.where(mask, tl.exp(x - higher), 0.0)
        total = total * shrink + tl.sum(p, 0)
        weighted = weighted * shrink + tl.sum(p * tl.where(mask, x, 0.0), 0)
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(logprobs + row, tl.load(places + target) * inverse - log_total)
    tl.store(entropies + row, log_total - weighted / total)
    if HAS_FACTORS:
        for start in tl.range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < WIDTH
            x = tl.load(places + column, mask=mask, other=0.0) * inverse
            factor = (tl.where(column == target, 1.0, 0.0) - tl.exp(x - log_total)) * inverse
            tl.store(factors + row * WIDTH + column, factor.to(factors.dtype.element_ty), mask=mask)


def supports(hidden_TD: torch.Tensor, head_weight_VD: torch.Tensor) -> bool:
    """Whether formats are within what this was written for, and the head is frozen."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return (
        not head_weight_VD.requires_grad
        and hidden_TD.shape[0] > 0
        and hidden_TD.dtype in floats
        and head_weight_VD.dtype in floats
    )


def _logits(hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    if head_VD.is_cuda and head_VD.dtype is not torch.float32:
        # The product is accumulated in float32 anyway: take it before it is rounded.
        return torch.mm(hidden_TD, head_VD.t(), out_dtype=torch.float32)
    return F.linear(hidden_TD, head_VD).float()


def _directions(factors_TV: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    if head_VD.is_cuda and head_VD.dtype is not torch.float32:
        # Sums over a whole vocabulary: split ones must not meet in bf16.
        return torch.mm(factors_TV, head_VD, out_dtype=torch.float32)
    return torch.mm(factors_TV, head_VD)


class _DirectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        inverse_temperature: torch.Tensor,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, (vocab_size, width) = hidden.shape[0], head.shape
        has_factors = ctx.needs_input_grad[0]
        logprobs = inverse_temperature.new_empty(num_tokens)
        entropies = torch.empty_like(logprobs)
        most = min(chunk_tokens, num_tokens)
        factors = head.new_empty(most if has_factors else 0, vocab_size)
        directions = hidden.new_empty(num_tokens if has_factors else 0, width)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part].to(head.dtype), head)
            rows = logits.shape[0]
            _logprob_rows_kernel[(rows,)](
                logits, targets[part], inverse_temperature[part], logprobs[part], entropies[part], factors,
                WIDTH=vocab_size, BLOCK=_BLOCK, HAS_FACTORS=has_factors, num_warps=8,
            )  # fmt: skip
            del logits
            if has_factors:
                directions[part] = _directions(factors[:rows], head)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, inverse_temperature, entropies, directions)
        ctx.chunk_tokens = chunk_tokens
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, head, inverse_temperature, entropies, directions = ctx.saved_tensors
        logprob_grads, entropy_grads = grads
        hidden_grad = None
        if logprob_grads is not None:
            hidden_grad = (directions * logprob_grads[:, None]).to(hidden.dtype)
        if entropy_grads is not None:
            of_entropy = reference.entropy_hidden_grad(
                hidden, head, inverse_temperature, entropies, entropy_grads, ctx.chunk_tokens
            )
            hidden_grad = of_entropy if hidden_grad is None else hidden_grad + of_entropy
        return hidden_grad, None, None, None, None


def token_logprobs(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    inverse_temperature_T: torch.Tensor,
    chunk_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, for what `supports` accepts."""
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS // head_weight_VD.shape[0])
        chunk_tokens -= chunk_tokens % 128 if chunk_tokens > 128 else 0
    inverse = inverse_temperature_T.contiguous()
    return _DirectedLogprobs.apply(hidden_TD, head_weight_VD, targets_T, inverse, chunk_tokens)  # type: ignore[no-any-return]
