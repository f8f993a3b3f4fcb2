"""Chunked divergences against probabilities worked out one by one in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.divergence import token_divergences

TOKENS, WIDTH, VOCAB = 7, 6, 40
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def _inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return student, teacher, head, targets


def _direct(student, teacher, head, kind: str, beta: float) -> torch.Tensor:
    """Sums over tokens and words, written as the definitions stand; autograd knows the rest."""
    totals = []
    for row in range(TOKENS):
        p, q = ((hidden[row] @ head.t()).exp() for hidden in (student, teacher))
        p, q = p / p.sum(), q / q.sum()
        total = torch.zeros((), dtype=torch.float64)
        for word in range(VOCAB):
            if kind == "reverse_kl":
                total = total + p[word] * (p[word] / q[word]).log()
            elif kind == "forward_kl":
                total = total + q[word] * (q[word] / p[word]).log()
            else:
                mixed = beta * q[word] + (1 - beta) * p[word]
                total = total + beta * q[word] * (q[word] / mixed).log()
                total = total + (1 - beta) * p[word] * (p[word] / mixed).log()
        totals.append(total)
    return torch.stack(totals)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("chunk_tokens", [3, None])
def test_values_and_gradients_equal_the_definition(kind, beta, chunk_tokens):
    student, teacher, head, targets = _inputs()
    student.requires_grad_()
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    expected = _direct(student, teacher, head, kind, beta)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), student)
    found = token_divergences(
        student, teacher, head, targets, kind, beta=beta, chunk_tokens=chunk_tokens
    ).divergences_T
    (grad,) = torch.autograd.grad((found * weights).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)
    assert found.min() > 0.01


def test_what_is_reported_beside_the_divergence():
    student, teacher, head, targets = _inputs()
    found = token_divergences(student.requires_grad_(), teacher, head, targets, "forward_kl")
    log_p = (student @ head.t()).log_softmax(-1)
    torch.testing.assert_close(found.reverse_kls_T, _direct(student, teacher, head, "reverse_kl", 0.5))
    torch.testing.assert_close(found.entropies_T, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(found.logprobs_T, log_p.gather(-1, targets[:, None])[:, 0])
    p, q = log_p.exp(), (teacher @ head.t()).softmax(-1)
    torch.testing.assert_close(found.overlaps_T, torch.minimum(p, q).sum(-1))
    assert [tensor.requires_grad for tensor in found] == [True, False, False, False, False]


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, beta):
    student, _, head, targets = _inputs(torch.float32)
    student.requires_grad_()
    found = token_divergences(student, student.detach().clone(), head, targets, kind, beta=beta)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    assert found.divergences_T.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_certain_distributions_stay_finite(kind):
    student = torch.tensor([[300.0, -300.0]]).requires_grad_()
    found = token_divergences(student, -student.detach(), torch.eye(2), torch.tensor([0]), kind)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    assert math.isfinite(found.divergences_T.item())
    assert grad.isfinite().all()


def test_the_whole_matrix_never_exists():
    student, teacher, head, targets = _inputs(torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape != head.shape and VOCAB in out.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        student.requires_grad_()
        token_divergences(
            student, teacher, head, targets, "jsd", chunk_tokens=2
        ).divergences_T.sum().backward()
    assert 0 < largest <= 6 * VOCAB  # the transposed head has as many


def test_hidden_states_that_do_not_fit_are_named():
    student, teacher, head, targets = _inputs()
    with pytest.raises(ShapeMismatch, match="teacher"):
        token_divergences(student, teacher[:3], head, targets, "reverse_kl")
