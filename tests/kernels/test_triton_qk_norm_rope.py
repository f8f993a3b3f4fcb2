"""Query and key norm with rotary embedding in Triton: values and gradients against float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.qk_norm_rope import qk_norm_rope, reference
from kiln_nn.kernels.rotary import rotary_tables
from tests.support.tiny_models import tiny_config
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
    trust_backward_kernels,
)

EPS = 1e-6
TOKENS = 9
# One rounding to the format; the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}


def _kernel():
    from kiln_nn.kernels.qk_norm_rope import triton

    return triton


def _inputs(num_heads: int, head_dim: int, fraction: float, dtype: torch.dtype):
    """Every second head of a wider projection, as queries lie beside their gates."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(TOKENS, 2 * num_heads, head_dim, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(head_dim, generator=generator).to(DEVICE)
    config = tiny_config(head_dim=head_dim, rotary_fraction=fraction)
    tables = rotary_tables(torch.arange(TOKENS, device=DEVICE) * 3, config)
    return wide[:, ::2], weight, EPS, *tables


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("sizes", [(16, 256, 0.25), (3, 24, 0.5), (1, 16, 1.0)], ids=str)
def test_values_and_gradient(sizes, dtype, monkeypatch):
    poison_new_memory(monkeypatch)
    x, weight, eps, cos, sin = _inputs(*sizes, dtype)
    exact = x.double().requires_grad_()
    expected = reference.qk_norm_rope(exact, weight.double(), eps, cos.double(), sin.double())
    out_grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact, out_grad.double())
    x.requires_grad_()
    assert _kernel().supports(x, weight, cos, sin)
    out = _kernel().qk_norm_rope(x, weight, eps, cos, sin)
    (grad,) = torch.autograd.grad(out, x, out_grad)
    assert out.dtype == grad.dtype == dtype
    assert relative_error(out.detach(), expected.detach()) < TOLERANCE[dtype]
    assert relative_error(grad, expected_grad) < TOLERANCE[dtype]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_function_chooses_it_on_a_gpu(monkeypatch):
    trust_backward_kernels(monkeypatch)
    x, *rest = _inputs(2, 32, 0.5, torch.bfloat16)
    assert type(qk_norm_rope(x.requires_grad_(), *rest).grad_fn).__name__ == "_QkNormRopeBackward"


@only_outside_interpreter
@needs_triton
def test_it_compiles():
    x, *rest = _inputs(16, 256, 0.25, torch.bfloat16)
    x.requires_grad_()
    with compiling_instead_of_launching((80, 90)) as compiled:
        torch.autograd.grad(_kernel().qk_norm_rope(x, *rest).sum(), x)
    assert len(compiled) == 4
