"""The fused attention for packed documents against the reference in float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.varlen_attention import flash, reference, varlen_attention
from tests.support.triton_kernels import relative_error, trust_backward_kernels

BOUNDS = (0, 1, 130, 130, 514)


def _draw(num_heads: int, num_kv_heads: int, head_dim: int, dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BOUNDS[-1], heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(16, 4, 256), (8, 2, 64), (4, 4, 128)])
def test_outputs_and_gradients_equal_the_reference(monkeypatch, sizes):
    trust_backward_kernels(monkeypatch)
    leaves = _draw(*sizes, torch.bfloat16, "cuda")
    if flash.why_not(*leaves) is not None:
        pytest.skip(flash.why_not(*leaves))
    scale = sizes[2] ** -0.5
    out = varlen_attention(*leaves, BOUNDS, scale)
    assert type(out.grad_fn).__name__ == "FlashAttentionBackward0"
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    actual = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = reference.varlen_attention(*doubles, BOUNDS, scale)
    expected = (exact.detach(), *torch.autograd.grad(exact, doubles, grad.double()))
    # Probabilities and outputs are rounded to bf16.
    assert max(relative_error(*pair) for pair in zip(actual, expected, strict=True)) < 1e-2


def test_it_says_why_it_does_not_run():
    leaves = _draw(2, 1, 16, torch.float32, "cpu")
    assert flash.why_not(*leaves) == "the tensors are not on a CUDA device"
    out = varlen_attention(*leaves, BOUNDS, 0.25)
    assert torch.equal(out, reference.varlen_attention(*leaves, BOUNDS, 0.25))
