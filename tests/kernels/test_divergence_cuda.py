"""Divergences on a GPU at a released model's width, with a bf16 head, against float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.divergence import token_divergences, top_k_divergences
from tests.support.delta_inputs import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, WIDTH, VOCAB = 2000, 2560, 248_320
CHUNK_TOKENS = 67  # what the default comes to


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_bf16_head_gives_what_float64_gives_for_the_same_numbers(kind):
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (torch.randn(TOKENS, WIDTH, generator=generator, device="cuda") for _ in range(2))
    teacher = student + 0.3 * teacher
    head = (torch.randn(VOCAB, WIDTH, generator=generator, device="cuda") * 0.03).bfloat16()
    targets = torch.arange(TOKENS, device="cuda")
    # As the model hands them over: rounded to the head's format.
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = token_divergences(student, teacher, head, targets, kind)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    chunk_bytes = CHUNK_TOKENS * VOCAB * 4
    # One whole matrix would be 30 of them.
    assert torch.cuda.max_memory_allocated() - before < 12 * chunk_bytes

    exact, exact_head = student.detach()[:8].double().requires_grad_(), head.double()
    expected = token_divergences(exact, teacher[:8].double(), exact_head, targets[:8], kind)
    (expected_grad,) = torch.autograd.grad(expected.divergences_T.sum(), exact)
    # Products are summed in float32; the gradient is rounded to bf16 once, its logits before that.
    assert relative_error(found.divergences_T[:8].double(), expected.divergences_T) < 1e-4
    assert relative_error(grad[:8].double(), expected_grad) < 1e-2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_teachers_likeliest_tokens_give_what_float64_gives(kind):
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (torch.randn(256, WIDTH, generator=generator, device="cuda") for _ in range(2))
    head = (torch.randn(VOCAB, WIDTH, generator=generator, device="cuda") * 0.03).bfloat16()
    targets = torch.arange(256, device="cuda")
    student, teacher = student.bfloat16().requires_grad_(), (student + 0.3 * teacher).bfloat16()
    logprobs, ids = (teacher @ head.t()).float().log_softmax(-1).topk(64, dim=-1)
    found = top_k_divergences(student, ids, logprobs, head, targets, kind)
    (grad,) = torch.autograd.grad(found.divergences_T.sum(), student)
    exact = student.detach()[:8].double().requires_grad_()
    expected = top_k_divergences(exact, ids[:8], logprobs[:8].double(), head.double(), targets[:8], kind)
    (expected_grad,) = torch.autograd.grad(expected.divergences_T.sum(), exact)
    assert relative_error(found.divergences_T[:8].double(), expected.divergences_T) < 1e-4
    assert relative_error(grad[:8].double(), expected_grad) < 1e-2
