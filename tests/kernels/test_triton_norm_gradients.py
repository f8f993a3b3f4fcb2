"""Gradients of norms and SwiGLU in Triton against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.rms_norm import add_rms_norm, gated_rms_norm, reference, rms_norm
from kiln_nn.kernels.swiglu import reference as swiglu_reference
from kiln_nn.kernels.swiglu import swiglu
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
# One rounding to the gradient's format; the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}
FORMATS = list(TOLERANCE)


def _training(name: str):
    from kiln_nn.kernels.rms_norm import training as norms
    from kiln_nn.kernels.swiglu import training as gates

    return {"rms_norm": norms, "swiglu": gates}[name]


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def _compare(run, exact, leaves: list[torch.Tensor], weight: torch.Tensor | None = None) -> None:
    """Gradients through `run` against those through `exact` in float64, at random gradients of outputs."""
    fixed = [] if weight is None else [weight]
    out = run(*leaves, *fixed)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in outputs]
    actual = torch.autograd.grad(outputs, leaves, grads)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected_out = exact(*doubles, *(x.double() for x in fixed))
    expected_outputs = expected_out if isinstance(expected_out, tuple) else (expected_out,)
    expected = torch.autograd.grad(expected_outputs, doubles, [g.double() for g in grads])
    for leaf, got, want in zip(leaves, actual, expected, strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, want) < TOLERANCE[leaf.dtype]


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 2560), (5, 33), (37, 128)], ids=str)
def test_norms_with_and_without_the_residual(shape, dtype, poisoned):
    weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    x, residual = _leaves(shape, shape, dtype=dtype)
    norms = _training("rms_norm")
    _compare(
        lambda x, w: norms.rms_norm(x, w, EPS, offset=1.0),
        lambda x, w: reference.rms_norm(x, w, EPS, offset=1.0),
        [x],
        weight,
    )
    if dtype is torch.float32:  # in bf16 the sum is rounded before it is normed
        _compare(
            lambda x, r, w: norms.add_rms_norm(x, r, w, EPS, offset=1.0),
            lambda x, r, w: reference.add_rms_norm(x, r, w, EPS, offset=1.0),
            [x, residual],
            weight,
        )


@on_triton
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 128), (7, 24)], ids=str)
def test_the_gated_norm(shape, dtype, poisoned):
    weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    norms = _training("rms_norm")
    _compare(
        lambda x, z, w: norms.gated_rms_norm(x, z, w, EPS),
        lambda x, z, w: reference.gated_rms_norm(x, z, w, EPS),
        _leaves(shape, shape, dtype=dtype),
        weight,
    )


@on_triton
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_swiglu(dtype, poisoned):
    leaves = _leaves((5, 1025), (5, 1025), dtype=dtype)
    _compare(_training("swiglu").swiglu, swiglu_reference.swiglu, leaves)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_functions_choose_them_on_a_gpu(monkeypatch):
    trust_backward_kernels(monkeypatch)
    x, z = _leaves((4, 64), (4, 64), dtype=torch.bfloat16)
    weight = torch.ones(64, device=DEVICE)
    outputs = (
        rms_norm(x, weight, EPS, offset=1.0),
        add_rms_norm(x, z, weight, EPS, offset=1.0)[0],
        gated_rms_norm(x, z, weight, EPS),
        swiglu(x, z),
    )
    names = [type(out.grad_fn).__name__ for out in outputs]
    assert names == ["_RmsNormBackward", "_AddRmsNormBackward", "_GatedRmsNormBackward", "_SwigluBackward"]


@only_outside_interpreter
@needs_triton
def test_they_compile():
    x, z = (torch.zeros(64, 2560).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.zeros(2560).bfloat16()
    with compiling_instead_of_launching((80, 90)) as compiled:
        for out in (
            _training("rms_norm").rms_norm(x, weight, EPS, offset=1.0),
            _training("rms_norm").gated_rms_norm(x, z, weight, EPS),
            _training("swiglu").swiglu(x, z),
        ):
            torch.autograd.grad(out.sum(), x)
        total, normed = _training("rms_norm").add_rms_norm(x, z, weight, EPS, offset=1.0)
        torch.autograd.grad((total.sum(), normed.sum()), x)
    assert len(compiled) == 2 * 8
