"""Log-probabilities in Triton, their gradient made ahead of time, against float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.logprobs import reference, token_logprobs
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

TOKENS, WIDTH, VOCAB = 11, 16, 5003
# bf16: what multiplies the head is rounded, and so is the gradient.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}


def _kernel():
    from kiln_nn.kernels.logprobs import triton

    return triton


def _inputs(dtype: torch.dtype, vocab: int = VOCAB):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(DEVICE, dtype)
    head = torch.randn(vocab, WIDTH, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    inverse = 1 / (torch.rand(TOKENS, generator=generator) + 0.5)
    return hidden.requires_grad_(), head, targets.to(DEVICE), inverse.to(DEVICE)


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("vocab", [7, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else list(TOLERANCE), ids=str)
def test_values_and_gradients_equal_the_whole_matrix(dtype, vocab, with_entropy, monkeypatch):
    poison_new_memory(monkeypatch)
    hidden, head, targets, inverse = _inputs(dtype, vocab)
    weights = torch.linspace(-1, 1, TOKENS, device=DEVICE)

    def gradient(values, leaf) -> torch.Tensor:
        logprobs, entropies = values
        loss = (logprobs * weights).sum()
        if with_entropy:
            loss = loss + (entropies * weights**2).sum()
        return torch.autograd.grad(loss, leaf)[0]

    actual = _kernel().token_logprobs(hidden, head, targets, inverse, 4)
    exact = hidden.detach().double().requires_grad_()
    log_p = ((exact @ head.double().t()) * inverse.double()[:, None]).log_softmax(-1)
    expected = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got.detach(), want.detach()) < TOLERANCE[torch.float32]
    assert relative_error(gradient(actual, hidden), gradient(expected, exact)) < TOLERANCE[dtype]


@on_triton
def test_without_gradients_nothing_is_prepared():
    hidden, head, targets, inverse = _inputs(torch.float32)
    with torch.no_grad():
        logprobs, _ = _kernel().token_logprobs(hidden, head, targets, inverse, None)
    expected, _ = reference.token_logprobs(hidden.detach(), head, targets, inverse, None)
    assert relative_error(logprobs, expected) < 1e-5


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_a_head_that_learns_takes_the_reference_on_a_gpu():
    hidden, head, targets, _ = _inputs(torch.float32)
    frozen = token_logprobs(hidden, head, targets).logprobs_T
    assert type(frozen.grad_fn).__name__ == "_DirectedLogprobsBackward"
    token_logprobs(hidden, head.requires_grad_(), targets).logprobs_T.sum().backward()
    assert head.grad is not None


@only_outside_interpreter
@needs_triton
def test_it_compiles():
    hidden, head, targets, inverse = _inputs(torch.bfloat16)
    with compiling_instead_of_launching((80, 90)) as compiled:
        _kernel().token_logprobs(hidden, head, targets, inverse, None)
    assert len(compiled) == 2
