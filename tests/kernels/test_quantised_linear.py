"""Linear layers over quantised weights against float64 products of the same weights made whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.linear import (
    LinearConfig,
    RegisterConfig,
    SpecialisedConfig,
    invariant_config,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
)
from kiln_nn.kernels.linear.choice_quantised import choose
from kiln_nn.kernels.linear.config import LinearKind, Tiling
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn, round_groups, round_rows
from tests.support.quantised_linears import (
    EIGHT_BIT_TOLERANCE,
    ODD,
    SCHEMES,
    SMALL,
    TOLERANCE,
    draw,
    drawn_matrix,
    poisoned,
    product,
)
from tests.support.triton_kernels import (
    INTERPRETED,
    on_triton,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

TOKENS = [3, 17] if INTERPRETED else [1, 3, 16, 33, 64, 128, 300, 2048]
PLAIN_TOKENS = (1, 16, 300)  # of other GPUs' kernel, on a GPU: few, and more than a tile
# The layers of Qwen3.5-4B by what becomes of their products; qkv_proj has in_proj's tiles.
SIZES = {
    LinearKind.PLAIN: [ODD] if INTERPRETED else [ODD, (12288, 2560)],
    LinearKind.GATED: [ODD] if INTERPRETED else [ODD, (18432, 2560)],
    LinearKind.PARTIAL: [ODD] if INTERPRETED else [ODD, (2560, 4096), (2560, 9216)],
}


def _quantised():
    from kiln_nn.kernels.linear import quantised

    return quantised


def _config(x: torch.Tensor, matrix: QuantisedMatrix, kind: LinearKind) -> Tiling:
    """A small one in the interpreter; on a GPU the chosen one, or that of any number of tokens."""
    if INTERPRETED:
        return SMALL
    is_hopper = _quantised().takes_hopper(x, matrix)
    chosen = choose(matrix.scheme, len(x), *matrix.shape, kind, is_hopper=is_hopper)
    return chosen or invariant_config(*matrix.shape, matrix.scheme)


@pytest.fixture(params=["plain"] if INTERPRETED else ["plain", "hopper"])
def kernel(request, monkeypatch):
    """Runs the kernel of other GPUs also on Hopper, or there the chosen one."""
    if request.param == "plain":
        monkeypatch.setattr(_quantised(), "takes_hopper", lambda x, w: False)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")

    def run(x: torch.Tensor, matrix: QuantisedMatrix, out: torch.Tensor, kind: LinearKind) -> torch.Tensor:
        _quantised().launch(x, matrix, out, _config(x, matrix, kind), kind)
        return out

    return run


def _cases(sizes: list[tuple[int, int]]) -> pytest.MarkDecorator:
    """Kernels, numbers of tokens and sizes; the plain kernel's tiles are the same for every layer."""
    if INTERPRETED:
        cases = [("plain", num_tokens, ODD) for num_tokens in TOKENS]
    else:
        cases = [("plain", num_tokens, ODD) for num_tokens in PLAIN_TOKENS]
        cases += [("hopper", num_tokens, size) for num_tokens in TOKENS for size in sizes]
    return pytest.mark.parametrize(("kernel", "num_tokens", "size"), cases, indirect=["kernel"])


def _tolerance(x: torch.Tensor, matrix: QuantisedMatrix, kind: LinearKind, dtype: torch.dtype) -> float:
    """Of the kernel that runs here: some round x to E4M3, some four-bit weights to bf16 once scaled."""
    config = _config(x, matrix, kind)
    if not isinstance(config, RegisterConfig) and config.x_bits == 8 and _quantised().takes_hopper(x, matrix):
        return EIGHT_BIT_TOLERANCE
    if isinstance(config, SpecialisedConfig):
        from kiln_nn.kernels.linear.triton_hopper_specialised import scales_weights

        return TOLERANCE[torch.bfloat16 if scales_weights(config) else dtype]
    return TOLERANCE[torch.bfloat16 if matrix.scheme == "int4" and len(x) > 128 else dtype]


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@_cases(SIZES[LinearKind.PLAIN])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme, num_tokens, size, kernel):
    x, matrix, kind = draw(num_tokens, size[1]), drawn_matrix(scheme, *size), LinearKind.PLAIN
    # For every size only the end of the kernel differs.
    for dtype in (torch.bfloat16, torch.float32) if size == ODD else (torch.bfloat16,):
        out = kernel(x, matrix, poisoned(num_tokens, size[0], dtype=dtype), kind)
        error = relative_error(out, product(scheme, *size, num_tokens))
        assert error < _tolerance(x, matrix, kind, dtype)


@on_triton
@_cases(SIZES[LinearKind.GATED])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gated_form(scheme, num_tokens, size, kernel):
    x, matrix, kind = draw(num_tokens, size[1]) / 8, drawn_matrix(scheme, *size), LinearKind.GATED
    out = kernel(x, matrix, poisoned(num_tokens, size[0] // 2, dtype=torch.bfloat16), kind)
    gate, up = (product(scheme, *size, num_tokens) / 8).chunk(2, dim=1)
    assert relative_error(out, F.silu(gate) * up) < _tolerance(x, matrix, kind, torch.bfloat16)


@on_triton
@_cases(SIZES[LinearKind.PARTIAL])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_partial_sums(scheme, num_tokens, size, kernel):
    x, matrix, kind = draw(num_tokens, size[1]), drawn_matrix(scheme, *size), LinearKind.PARTIAL
    splits = _config(x, matrix, kind).splits
    out = kernel(x, matrix, poisoned(splits, num_tokens, size[0], dtype=torch.float32), kind)
    error = relative_error(out.double().sum(0), product(scheme, *size, num_tokens))
    assert error < _tolerance(x, matrix, kind, torch.float32)


@on_triton
def test_group_scales_in_float32(kernel):
    x, matrix = draw(3, ODD[1]), drawn_matrix("int4", *ODD)
    wide = QuantisedMatrix("int4", matrix.values, matrix.scales.float())
    out = kernel(x, wide, poisoned(3, ODD[0], dtype=torch.float32), LinearKind.PLAIN)
    assert relative_error(out, product("int4", *ODD, 3)) < TOLERANCE[torch.float32]


@on_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_lie_apart(scheme, kernel):
    num_rows, num_inputs = ODD[0] - 10, ODD[1]
    x, matrix = draw(5, num_inputs + 128)[:, 128:], drawn_matrix(scheme, *ODD).rows(8, 8 + num_rows)
    out = poisoned(5, num_rows + 20, dtype=torch.bfloat16)
    kernel(x, matrix, out[:, 16:-4], LinearKind.PLAIN)
    expected = x.double() @ matrix.dequantise(torch.float32).double().t()
    assert relative_error(out[:, 16:-4], expected) < TOLERANCE[torch.bfloat16]
    assert out[:, :16].isnan().all()
    assert out[:, -4:].isnan().all()


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the public function asks for a GPU")
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 33, 64, 128, 200, 2048])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_rows_beside(scheme, num_tokens):
    size, num_beside = (12288, 2560), 64
    x, matrix, beside = (
        draw(num_tokens, size[1]),
        drawn_matrix(scheme, *size),
        draw(num_beside, size[1], seed=2),
    )
    out = linear_beside(x, [matrix, beside])
    assert out.is_contiguous()
    expected = x.double() @ beside.double().t()
    assert relative_error(out[:, size[0] :], expected) < TOLERANCE[torch.bfloat16]
    # The library may choose another kernel for rows that lie apart.
    assert relative_error(out[:, : size[0]], linear(x, matrix)) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.parametrize("num_beside", [32, 96])
@pytest.mark.parametrize("num_tokens", [9, 64, 200])
@pytest.mark.parametrize("config", [LinearConfig(64, 64, 128, 1, 4, 4), LinearConfig(128, 128, 128, 1, 8, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_beside_tiles(scheme, config, num_tokens, num_beside):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    size = (1000, 2560)
    x, matrix, beside = (
        draw(num_tokens, size[1]),
        drawn_matrix(scheme, *size),
        draw(num_beside, size[1], seed=2),
    )
    out = poisoned(num_tokens, size[0] + num_beside, dtype=torch.bfloat16)
    _quantised().launch(x, matrix, out, config, LinearKind.PLAIN, beside_BI=beside)
    assert relative_error(out[:, size[0] :], x.double() @ beside.double().t()) < TOLERANCE[torch.bfloat16]
    assert relative_error(out[:, : size[0]], product(scheme, *size, num_tokens)) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.parametrize("kind", list(LinearKind))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_invariant_row_does_not_depend_on_its_batch(scheme, kind, kernel, monkeypatch):
    size = ODD if INTERPRETED else (2560, 4096)
    config = SMALL if INTERPRETED else invariant_config(*size, scheme)
    monkeypatch.setattr(f"{__name__}._config", lambda x, matrix, kind: config)
    matrix, x = drawn_matrix(scheme, *size), draw(70, size[1])

    def compute(x: torch.Tensor) -> torch.Tensor:
        splits = config.splits if kind is LinearKind.PARTIAL else 1
        outputs = size[0] // 2 if kind is LinearKind.GATED else size[0]
        out = poisoned(splits, len(x), outputs, dtype=torch.float32)
        return kernel(x, matrix, out, kind)

    together = compute(x)
    for row in (0, 5, 69):
        assert torch.equal(compute(x[row : row + 1])[:, 0], together[:, row])
    assert torch.equal(compute(x[:6]), together[:, :6])


@on_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_weights(scheme):
    from kiln_nn.kernels.quantised import triton

    matrix = drawn_matrix(scheme, *SIZES[LinearKind.PARTIAL][-1])
    expected = matrix.numbers().unflatten(1, (matrix.scales.shape[1], -1)) * matrix.scales.float()[..., None]
    assert torch.equal(triton.dequantise(matrix, torch.float32), expected.flatten(1))
    if not INTERPRETED:
        assert torch.equal(triton.dequantise(matrix, torch.bfloat16), expected.flatten(1).bfloat16())


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds E4M3 its own way")
def test_rows_of_x_in_eight_bits():
    from kiln_nn.kernels.quantised.triton import quantise_rows

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with E4M3")
    x = draw(7, 300)
    numbers, scales = quantise_rows(x)
    expected = quantise_rtn(x, "fp8")
    assert torch.allclose(scales.t(), expected.scales, rtol=1e-6)
    assert relative_error(numbers.float() * scales.t(), x.float()) < EIGHT_BIT_TOLERANCE
    assert (numbers.float() != expected.numbers()).float().mean() < 0.01  # where a quotient lies between


@on_triton
@pytest.mark.parametrize("num_inputs", [128, 1152, 2048])
def test_groups_of_x_in_eight_bits(num_inputs):
    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with E4M3")
    x = torch.cat((draw(7, num_inputs), draw(7, 64)), dim=1)[:, :num_inputs]  # rows lie apart
    rows = round_groups(x)
    alone = round_rows(x.reshape(-1, 128))
    assert torch.equal(rows.numbers_TI.float(), alone.numbers_TI.float().view(x.shape))
    assert torch.equal(rows.scales_GT.t(), alone.scales_GT.view(len(x), -1))


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs the library of a GPU")
@pytest.mark.parametrize("size", [(12288, 2560), (2560, 9216)])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library(scheme, num_tokens, size, monkeypatch):
    x, matrix = draw(num_tokens, size[1]), drawn_matrix(scheme, *size)
    monkeypatch.setattr(_quantised(), "choose", lambda *args, **options: None)
    expected = product(scheme, *size, num_tokens)
    is_eight = _quantised().multiplies_eight_bits(x, matrix)
    # Weights rounded to bf16 again once scaled, or x rounded to E4M3.
    tolerance = EIGHT_BIT_TOLERANCE if is_eight else 6e-3
    assert relative_error(linear(x, matrix), expected) < tolerance
    assert relative_error(linear_partials(x, matrix).sum(0), expected) < tolerance
    gate, up = (expected / 8).chunk(2, dim=1)
    assert relative_error(linear_swiglu(x / 8, matrix), F.silu(gate) * up) < 2 * tolerance
    out = poisoned(num_tokens, size[0] + 8, dtype=torch.bfloat16)
    linear(x, matrix, out=out[:, :-8])
    assert relative_error(out[:, :-8], expected) < tolerance
    assert relative_error(linear(x, matrix, out_dtype=torch.float32), expected) < 6e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_cpu_weights_are_made_whole(scheme):
    matrix = quantise_rtn(torch.randn(16, 256) * 0.02, scheme)
    x, weight = torch.randn(5, 256), matrix.dequantise(torch.float32)
    assert torch.equal(linear(x, matrix), F.linear(x, weight))
    assert torch.equal(linear_partials(x, matrix), F.linear(x, weight)[None])
    gate, up = F.linear(x, weight).chunk(2, dim=1)
    assert torch.equal(linear_swiglu(x, matrix), F.silu(gate) * up)
    out = torch.full((5, 20), float("nan"))
    linear(x, matrix, out=out[:, 2:18])
    assert torch.equal(out[:, 2:18], F.linear(x, weight))
    assert out[:, :2].isnan().all()
    for is_invariant in (False, True):
        both = linear_beside(x, [matrix, weight[:4]], is_invariant=is_invariant)
        assert torch.allclose(both, F.linear(x, torch.cat([weight, weight[:4]])), atol=1e-6)


def test_unequal_shapes_are_refused():
    matrix = quantise_rtn(torch.randn(16, 256), "int4")
    for call in (linear, linear_swiglu, linear_partials):
        with pytest.raises(ShapeMismatch):
            call(torch.zeros(2, 128), matrix)
