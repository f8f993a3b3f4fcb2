"""Chunked log-probabilities and entropies against log_softmax over the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kiln_nn.kernels.logprobs import token_logprobs

TOKENS, WIDTH, VOCAB = 11, 6, 40


def _inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    temperatures = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.5
    return hidden, head, targets, temperatures


def _direct(hidden, head, targets, temperature):
    scaled = hidden @ head.t() / torch.as_tensor(temperature, dtype=hidden.dtype).reshape(-1, 1)
    log_p = torch.log_softmax(scaled, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, None])
@pytest.mark.parametrize("per_token_temperature", [False, True])
def test_values_and_gradients_equal_the_whole_matrix(chunk_tokens, per_token_temperature):
    hidden, head, targets, temperatures = _inputs()
    temperature = temperatures if per_token_temperature else 0.7
    weights = torch.linspace(-1, 1, TOKENS, dtype=torch.float64)
    hidden.requires_grad_()
    head.requires_grad_()
    expected = _direct(hidden, head, targets, temperature)
    expected_grads = torch.autograd.grad(
        (expected[0] * weights + expected[1] * weights**2).sum(), (hidden, head)
    )
    actual = token_logprobs(hidden, head, targets, temperature=temperature, chunk_tokens=chunk_tokens)
    loss = (actual.logprobs_T * weights + actual.entropies_T * weights**2).sum()
    grads = torch.autograd.grad(loss, (hidden, head))
    for got, want in zip((*actual, *grads), (*expected, *expected_grads), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient():
    hidden, head, targets, _ = _inputs(torch.float32)
    hidden.requires_grad_()
    token_logprobs(hidden, head, targets).logprobs_T.sum().backward()
    assert head.grad is None
    assert hidden.grad.abs().sum() > 0


def test_no_tensor_of_all_logits_is_made():
    hidden, head, targets, _ = _inputs(torch.float32)
    hidden.requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        token_logprobs(hidden, head, targets, chunk_tokens=3).logprobs_T.sum().backward()
    assert largest <= max(3 * VOCAB, head.numel())


def test_bf16_hidden_states_give_float32_results():
    hidden, head, targets, _ = _inputs(torch.bfloat16)
    result = token_logprobs(hidden, head, targets)
    expected, _ = _direct(hidden.float(), head.float(), targets, 1.0)
    assert result.logprobs_T.dtype == torch.float32
    # logits are rounded to bf16 by the matrix product: 8 bits of values around 5
    assert torch.allclose(result.logprobs_T, expected, atol=0.08)
