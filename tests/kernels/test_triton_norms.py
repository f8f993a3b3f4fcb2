"""Norms and SwiGLU in Triton against float64: odd sizes, strided inputs, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.quantised import round_rows
from kiln_nn.kernels.quantised.matrix import word_order
from kiln_nn.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_rounded,
    gated_rms_norm,
    reference,
    rms_norm,
    rms_norm_rounded,
)
from kiln_nn.kernels.swiglu import swiglu
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

EPS = 1e-6
# One rounding to the output's format; the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}
FORMATS = list(TOLERANCE)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def _kernels(name: str):
    from kiln_nn.kernels.rms_norm import triton as norms
    from kiln_nn.kernels.swiglu import triton as gates

    return {"rms_norm": norms, "swiglu": gates}[name]


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(1, 2560), (3, 2, 256), (5, 33), (70, 128), (2, 1)])
def test_rms_norm(shape, dtype, poisoned):
    x, weight = _draw(*shape, dtype=dtype), _draw(shape[-1], dtype=dtype, seed=1)
    expected = reference.rms_norm(x.double(), weight.double(), EPS, offset=1.0)
    out = _kernels("rms_norm").rms_norm(x, weight, EPS, offset=1.0)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert relative_error(out, expected) < TOLERANCE[dtype]


@on_triton
def test_rms_norm_of_rows_that_lie_apart(poisoned):
    wide = _draw(9, 200)
    x, weight = wide[:, 40:140], _draw(100, seed=1)
    out = _kernels("rms_norm").rms_norm(x, weight, EPS, offset=0.0)
    assert relative_error(out, reference.rms_norm(x, weight, EPS, offset=0.0)) < 1e-6


@on_triton
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(1, 2560), (17, 96), (2, 3, 40)])
def test_the_residual_is_added_then_normed(shape, dtype, poisoned):
    x, residual = _draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype, seed=1)
    weight = _draw(shape[-1], dtype=dtype, seed=2)
    out, total = _kernels("rms_norm").add_rms_norm(x, residual, weight, EPS, offset=1.0)
    exact = x.double() + residual.double()
    assert relative_error(total, exact) < TOLERANCE[dtype]
    # The norm is of the rounded sum, which is what the next layer adds to.
    expected = reference.rms_norm(total.double(), weight.double(), EPS, offset=1.0)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@on_triton
@pytest.mark.parametrize("num_partials", [0, 1, 3])
@pytest.mark.parametrize(
    ("shape", "order"),
    [((1, 2560), "plain"), ((3, 2560), "words"), ((17, 96), "plain"), ((70, 128), "words")],
)
def test_rows_are_rounded_as_a_kernel_of_their_own_does(shape, order, num_partials, poisoned):
    """To the bit; in float32 under the interpreter, whose bf16 and E4M3 are not those of a GPU."""
    from kiln_nn.kernels.quantised.triton import quantise_rows

    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with E4M3")
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    residual, weight = _draw(*shape, dtype=dtype), _draw(shape[-1], dtype=dtype, seed=2)
    kernels = _kernels("rms_norm")
    if num_partials == 0:
        rows = kernels.rms_norm_rounded(residual, weight, EPS, offset=1.0, order=order)
        assert torch.equal(rows.x_TI, kernels.rms_norm(residual, weight, EPS, offset=1.0))
    else:
        x = _draw(num_partials, *shape, seed=1)
        rows, total = kernels.add_rms_norm_rounded(x, residual, weight, EPS, offset=1.0, order=order)
        expected, expected_total = kernels.add_rms_norm(x, residual, weight, EPS, offset=1.0)
        assert torch.equal(rows.x_TI, expected)
        assert torch.equal(total, expected_total)
    assert rows.order == order
    numbers, scales = quantise_rows(rows.x_TI)
    in_order = numbers.float() if order == "plain" else word_order(numbers.float())
    assert torch.equal(rows.numbers_TI.float(), in_order)
    assert torch.equal(quantise_rows(rows.x_TI, order)[0].float(), in_order)
    assert torch.equal(rows.scales_GT, scales)
    # The interpreter does not round to the nearest.
    most_error = 8e-2 if INTERPRETED else 4e-2
    assert relative_error(numbers.float() * scales.t(), rows.x_TI.float()) < most_error


def test_elsewhere_rows_are_rounded_behind_the_norm():
    x, residual, weight = (_draw(*shape).cpu() for shape in ((2, 5, 64), (5, 64), (64,)))
    rows, total = add_rms_norm_rounded(x, residual, weight, EPS, offset=1.0)
    normed, expected = add_rms_norm(x, residual, weight, EPS, offset=1.0)
    assert torch.equal(rows.x_TI, normed)
    assert torch.equal(total, expected)
    assert torch.equal(rows.numbers_TI.float(), round_rows(normed).numbers_TI.float())
    assert torch.equal(
        rms_norm_rounded(residual, weight, EPS, offset=1.0).x_TI, rms_norm(residual, weight, EPS, offset=1.0)
    )


@on_triton
@pytest.mark.parametrize(("dtype", "x_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(3, 32, 128), (7, 24)])
def test_the_gated_norm(shape, dtype, x_dtype, poisoned):
    x, z = _draw(*shape, dtype=x_dtype), _draw(*shape, dtype=dtype, seed=1)
    weight = _draw(shape[-1], dtype=dtype, seed=2)
    out = _kernels("rms_norm").gated_rms_norm(x, z, weight, EPS)
    assert out.dtype == dtype
    expected = reference.gated_rms_norm(x.double(), z.double(), weight.double(), EPS)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@on_triton
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 9216), (5, 1025), (3, 7)])
def test_swiglu_of_the_halves_of_one_tensor(num_tokens, width, dtype, poisoned):
    both = _draw(num_tokens, 2 * width, dtype=dtype)
    gate, up = both.split(width, dim=1)
    out = _kernels("swiglu").swiglu(gate, up)
    assert relative_error(out, F.silu(gate.double()) * up.double()) < TOLERANCE[dtype]


@on_triton
def test_large_gates_do_not_overflow():
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]])
    assert torch.equal(_kernels("swiglu").swiglu(gate, torch.ones_like(gate)).cpu(), expected)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_functions_choose_the_kernels_on_a_gpu(monkeypatch):
    x, weight = _draw(4, 64), _draw(64, seed=1)
    calls = []
    for name in ("rms_norm", "add_rms_norm", "gated_rms_norm"):
        kernel = getattr(_kernels("rms_norm"), name)
        monkeypatch.setattr(
            _kernels("rms_norm"), name, lambda *a, k=kernel, **o: (calls.append(k.__name__), k(*a, **o))[1]
        )
    rms_norm(x, weight, EPS, offset=1.0)
    add_rms_norm(x, x, weight, EPS, offset=1.0)
    gated_rms_norm(x, x, weight, EPS)
    assert calls == ["rms_norm", "add_rms_norm", "gated_rms_norm"]
    rms_norm(x, weight.requires_grad_(), EPS, offset=1.0).sum().backward()  # needs the reference
    assert len(calls) == 3
    assert weight.grad is not None


def test_unequal_shapes_are_refused():
    with pytest.raises(ShapeMismatch):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeMismatch):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), EPS, offset=1.0)
    with pytest.raises(ShapeMismatch):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), EPS, offset=1.0)


@only_outside_interpreter
@needs_triton
def test_they_compile_for_every_supported_gpu():
    x, weight = torch.zeros(64, 2560).bfloat16(), torch.zeros(2560).bfloat16()
    heads, z = torch.zeros(64, 32, 128), torch.zeros(64, 32, 128).bfloat16()
    with compiling_instead_of_launching() as compiled:
        _kernels("rms_norm").rms_norm(x, weight, EPS, offset=1.0)
        _kernels("rms_norm").add_rms_norm(x, x, weight, EPS, offset=1.0)
        _kernels("rms_norm").gated_rms_norm(heads, z, weight[:128], EPS)
        _kernels("swiglu").swiglu(*torch.zeros(64, 18432).bfloat16().chunk(2, dim=1))
    with compiling_instead_of_launching((89, 90)) as rounding:  # that have E4M3
        _kernels("rms_norm").rms_norm_rounded(x, weight, EPS, offset=1.0)
        _kernels("rms_norm").add_rms_norm_rounded(x, x, weight, EPS, offset=1.0)
    assert len(compiled) == 8
    assert len(rounding) == 4
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)
