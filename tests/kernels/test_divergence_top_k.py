"""Divergences from a teacher's likeliest tokens against sums over the vocabulary in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.divergence import token_divergences, top_k_divergences

TOKENS, WIDTH, VOCAB = 7, 6, 40
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def _inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return student.requires_grad_(), teacher, head, targets


def _top(teacher, head, num_top: int):
    logprobs, ids = (teacher @ head.t()).log_softmax(-1).topk(num_top, dim=-1)
    return ids, logprobs


def _summed(student, teacher, head, num_top: int, kind: str, beta: float) -> torch.Tensor:
    """Both distributions summed up place by place, compared as the definitions stand; autograd knows the rest."""
    ids, _ = _top(teacher, head, num_top)
    places = []
    for hidden in (student, teacher):
        p_TV = (hidden @ head.t()).softmax(-1)
        top_TK = p_TV.gather(-1, ids)
        is_tail_TV = torch.ones_like(p_TV).scatter(-1, ids, 0)
        places.append(torch.cat((top_TK, (p_TV * is_tail_TV).sum(-1, keepdim=True)), dim=-1))
    p, q = places
    mixed = beta * q + (1 - beta) * p
    by_kind = {
        "reverse_kl": p * (p / q).log(),
        "forward_kl": q * (q / p).log(),
        "jsd": beta * q * (q / mixed).log() + (1 - beta) * p * (p / mixed).log(),
    }
    return by_kind[kind].sum(-1)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("chunk_tokens", [3, None])
def test_values_and_gradients_equal_the_definition(kind, beta, chunk_tokens):
    student, teacher, head, targets = _inputs()
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    expected = _summed(student, teacher, head, 5, kind, beta)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), student)
    found = top_k_divergences(
        student, *_top(teacher, head, 5), head, targets, kind, beta=beta, chunk_tokens=chunk_tokens
    )
    (grad,) = torch.autograd.grad((found.divergences_T * weights).sum(), student)
    torch.testing.assert_close(found.divergences_T, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        found.reverse_kls_T, _summed(student, teacher, head, 5, "reverse_kl", 0.5), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_whole_vocabulary_gives_the_full_divergence_and_its_gradient(kind, beta):
    student, teacher, head, targets = _inputs()
    full = token_divergences(student, teacher, head, targets, kind, beta=beta)
    (full_grad,) = torch.autograd.grad(full.divergences_T.sum(), student)
    found = top_k_divergences(student, *_top(teacher, head, VOCAB), head, targets, kind, beta=beta)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    for ours, theirs in zip(found, full, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, full_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_more_tokens_never_tell_less(kind, beta):
    student, teacher, head, targets = _inputs()
    told = [
        top_k_divergences(student, *_top(teacher, head, k), head, targets, kind, beta=beta).divergences_T
        for k in (1, 2, 8, 20, VOCAB)
    ]
    for fewer, more in itertools.pairwise(told):
        assert bool((fewer <= more + 1e-12).all())
    assert bool((told[0] < told[-1]).all())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_certain_distributions_stay_finite(kind):
    student = torch.tensor([[300.0, -300.0, 0.0]]).requires_grad_()
    ids, logprobs = torch.tensor([[1]]), torch.tensor([[0.0]])
    found = top_k_divergences(student, ids, logprobs, torch.eye(3), torch.tensor([0]), kind)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    assert math.isfinite(found.divergences_T.item())
    assert grad.isfinite().all()


def test_inputs_that_do_not_fit_are_named():
    student, teacher, head, targets = _inputs()
    ids, logprobs = _top(teacher, head, 4)
    with pytest.raises(ShapeMismatch, match="teacher's tokens"):
        top_k_divergences(student, ids[:3], logprobs, head, targets, "reverse_kl")
    with pytest.raises(ShapeMismatch, match="log-probabilities"):
        top_k_divergences(student, ids, logprobs[:, :3], head, targets, "reverse_kl")
