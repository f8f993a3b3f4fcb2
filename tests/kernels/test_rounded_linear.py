"""fp8's linear layers with x in E4M3, and who rounds it, against float64 products of the rounded rows."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.linear import (
    LinearConfig,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
    reads_rounded,
)
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import (
    QuantisedMatrix,
    RoundedRows,
    quantise_rtn,
    round_groups,
    round_rows,
    whole,
)
from tests.support.hopper_compiler import boxes_of, compile_for_hopper, weights_and_x
from tests.support.triton_kernels import (
    DEVICE,
    SHARED_MEMORY_LIMIT,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    relative_error,
)

# One rounding to bf16; in float32 what tensor cores lose of sums of 128 inputs, or of all of them.
BF16_TOLERANCE, PROMOTED_TOLERANCE, SHORT_TOLERANCE = 4e-3, 1e-3, 1e-2
TOKENS = [1, 17, 64, 100, 300]  # every one is compiled for
CASES = [*(("odd", num_tokens) for num_tokens in TOKENS), ("4b", 64), ("4b", 300)]
ODD = (100, 384)
P, G, S = LinearKind.PLAIN, LinearKind.GATED, LinearKind.PARTIAL
CONFIGS = {
    P: [LinearConfig(64, 48, 256, 1, 4, 3, 8), LinearConfig(128, 128, 128, 1, 8, 5, 8)],
    G: [LinearConfig(64, 24, 128, 1, 4, 6, 8), LinearConfig(128, 64, 128, 1, 8, 4, 8)],
    S: [LinearConfig(16, 64, 256, 2, 4, 4, 8), LinearConfig(128, 64, 128, 3, 4, 4, 8)],
}
UNPROMOTED = LinearConfig(256, 128, 128, 1, 8, 4, 8, promotes=False)
SIZES = {P: (12288, 2560), G: (18432, 2560), S: (2560, 9216)}


@cache
def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


@cache
def _matrix(num_outputs: int, num_inputs: int) -> QuantisedMatrix:
    return quantise_rtn(_draw(num_outputs, num_inputs, seed=1) * 0.02, "fp8")


def _product(x: RoundedRows, matrix: QuantisedMatrix) -> torch.Tensor:
    return x.dequantise(torch.float64) @ (matrix.values.double() * matrix.scales.double()).t()


def _needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def _poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def _launch(x, matrix, out, config, kind, **options):
    from kiln_nn.kernels.linear import quantised

    quantised.launch(x, matrix, out, config, kind, **options)
    return out


@on_triton
@pytest.mark.parametrize(("size", "num_tokens"), CASES)
@pytest.mark.parametrize("config", [*CONFIGS[P], UNPROMOTED])
def test_linear(config, size, num_tokens):
    _needs_hopper()
    size = ODD if size == "odd" else SIZES[P]
    x, matrix = round_rows(_draw(num_tokens, size[1])), _matrix(*size)
    expected = _product(x, matrix)
    out = _launch(x, matrix, _poisoned(num_tokens, size[0]), config, P)
    assert relative_error(out, expected) < (BF16_TOLERANCE if config.promotes else SHORT_TOLERANCE)
    if num_tokens == 300:
        out = _launch(x, matrix, _poisoned(num_tokens, size[0], dtype=torch.float32), config, P)
        assert relative_error(out, expected) < (PROMOTED_TOLERANCE if config.promotes else SHORT_TOLERANCE)


@on_triton
@pytest.mark.parametrize(("size", "num_tokens"), CASES)
@pytest.mark.parametrize("config", CONFIGS[G])
def test_the_gated_form(config, size, num_tokens):
    _needs_hopper()
    size = ODD if size == "odd" else SIZES[G]
    x, matrix = round_rows(_draw(num_tokens, size[1])), _matrix(*size)
    gate, up = _product(x, matrix).chunk(2, dim=1)
    out = _launch(x, matrix, _poisoned(num_tokens, size[0] // 2), config, G)
    assert relative_error(out, F.silu(gate) * up) < BF16_TOLERANCE


@on_triton
@pytest.mark.parametrize(("size", "num_tokens"), CASES)
@pytest.mark.parametrize("config", CONFIGS[S])
def test_partial_sums(config, size, num_tokens):
    _needs_hopper()
    size = (100, 1152) if size == "odd" else SIZES[S]
    x, matrix = round_rows(_draw(num_tokens, size[1])), _matrix(*size)
    out = _poisoned(config.splits, num_tokens, size[0], dtype=torch.float32)
    _launch(x, matrix, out, config, S)
    assert relative_error(out.double().sum(0), _product(x, matrix)) < PROMOTED_TOLERANCE


@on_triton
@pytest.mark.parametrize(("size", "num_tokens"), CASES)
@pytest.mark.parametrize("config", CONFIGS[S])
def test_partial_sums_of_groups_with_scales(config, size, num_tokens):
    _needs_hopper()
    size = (100, 1152) if size == "odd" else SIZES[S]
    # Groups far apart, so that a scale in another's place would show.
    far_apart = torch.logspace(-2, 2, size[1] // 128, device=DEVICE).repeat_interleave(128)
    x, matrix = round_groups((_draw(num_tokens, size[1]) * far_apart).bfloat16()), _matrix(*size)
    out = _poisoned(config.splits, num_tokens, size[0], dtype=torch.float32)
    from kiln_nn.kernels.linear import triton_hopper_rounded

    triton_hopper_rounded.launch(x, matrix, out, config)  # of any tile: the layers choose few tokens
    assert relative_error(out.double().sum(0), _product(x, matrix)) < PROMOTED_TOLERANCE


def test_on_a_cpu_groups_are_rounded_each_by_itself():
    x = torch.randn(5, 384)
    rows = round_groups(x)
    alone = round_rows(x.reshape(-1, 128))
    assert rows.has_groups
    assert torch.equal(rows.dequantise(), alone.dequantise().view(x.shape))
    assert relative_error(rows.dequantise(), x) < 4e-2
    assert round_groups(rows) is rows
    assert not round_rows(rows).has_groups
    assert round_groups(round_rows(x)).has_groups is False


@on_triton
def test_rows_that_lie_apart():
    _needs_hopper()
    x, matrix = _draw(5, ODD[1] + 128)[:, 128:], _matrix(*ODD).rows(8, 98)
    out = _poisoned(5, 110)
    _launch(x, matrix, out[:, 16:-4], CONFIGS[P][0], P)
    assert relative_error(out[:, 16:-4], _product(round_rows(x), matrix)) < BF16_TOLERANCE
    assert out[:, :16].isnan().all()
    assert out[:, -4:].isnan().all()


@on_triton
@pytest.mark.parametrize("num_beside", [32, 96])
@pytest.mark.parametrize("num_tokens", [3, 64, 300])
@pytest.mark.parametrize("config", [LinearConfig(8, 64, 256, 1, 4, 4, 8), *CONFIGS[P], UNPROMOTED])
def test_whole_rows_beside(config, num_tokens, num_beside):
    _needs_hopper()
    size = (1024, 2560)
    x, matrix, beside = round_rows(_draw(num_tokens, size[1])), _matrix(*size), _draw(96, size[1], seed=2)
    beside = beside[:num_beside]
    out = _launch(x, matrix, _poisoned(num_tokens, size[0] + num_beside), config, P, beside_BI=beside)
    # From x before it was rounded.
    assert relative_error(out[:, size[0] :], x.x_TI.double() @ beside.double().t()) < BF16_TOLERANCE
    tolerance = BF16_TOLERANCE if config.promotes else SHORT_TOLERANCE
    assert relative_error(out[:, : size[0]], _product(x, matrix)) < tolerance


@on_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_a_row_does_not_depend_on_its_batch(kind):
    _needs_hopper()
    matrix, x, config = _matrix(2560, 4096), _draw(70, 4096), CONFIGS[kind][0]

    def compute(x: torch.Tensor) -> torch.Tensor:
        outputs = 1280 if kind is G else 2560
        out = _poisoned(config.splits, len(x), outputs, dtype=torch.float32)
        return _launch(x, matrix, out if kind is S else out[0], config, kind)

    together = compute(x)
    for row in (0, 5, 69):
        assert torch.equal(compute(x[row : row + 1])[..., 0, :], together[..., row, :])


@on_triton
def test_rows_rounded_before_give_the_same_bits():
    """By the own kernel and by the library, whoever rounds."""
    _needs_hopper()
    for num_tokens in (3, 40, 2048):
        x, matrix = _draw(num_tokens, 2560), _matrix(18432, 2560)
        rows, beside = round_rows(x), _draw(64, 2560, seed=2)
        for config in (None, CONFIGS[P][0]):
            assert torch.equal(linear(rows, matrix, config=config), linear(x, matrix, config=config))
        assert torch.equal(linear_swiglu(rows, matrix), linear_swiglu(x, matrix))
        assert torch.equal(linear_partials(round_groups(x), matrix), linear_partials(x, matrix))
        assert torch.equal(linear_beside(rows, [matrix, beside]), linear_beside(x, [matrix, beside]))


def test_on_a_cpu_rounded_rows_are_read_whole():
    x, matrix, beside = torch.randn(5, 256), quantise_rtn(torch.randn(16, 256), "fp8"), torch.randn(4, 256)
    rows = round_rows(x)
    assert whole(rows) is x
    assert round_rows(rows) is rows
    assert relative_error(rows.dequantise(), x) < 4e-2
    assert torch.equal(linear(rows, matrix), linear(x, matrix))
    assert torch.equal(linear(rows, beside), linear(x, beside))
    assert torch.equal(linear_swiglu(rows, matrix), linear_swiglu(x, matrix))
    assert torch.equal(linear_partials(rows, matrix), linear_partials(x, matrix))
    assert torch.equal(linear_beside(rows, [matrix, beside]), linear_beside(x, [matrix, beside]))
    assert not reads_rounded(x, [matrix, beside])


@needs_triton
def test_who_reads_rounded_rows(monkeypatch):
    """Kernels whose configuration says so, and the library where it multiplies E4M3."""
    from kiln_nn.kernels.linear import quantised

    choices = {P: LinearConfig(64, 64, 128, x_bits=8), G: LinearConfig(64, 64, 128)}
    monkeypatch.setattr(quantised, "takes_triton", lambda *tensors: True)
    monkeypatch.setattr(quantised, "takes_hopper", lambda x, matrix: True)
    monkeypatch.setattr(quantised, "_has_row_scaled_product", lambda device: True)
    monkeypatch.setattr(
        quantised,
        "choose",
        lambda scheme, tokens, *size, is_hopper: choices[size[2]] if tokens < 99 else None,
    )
    matrix, four_bits = (quantise_rtn(torch.randn(64, 256).bfloat16(), scheme) for scheme in ("fp8", "int4"))
    few, many, beside = (torch.zeros(count, 256).bfloat16() for count in (9, 128, 4))
    assert reads_rounded(few, [matrix, beside])
    assert not reads_rounded(few, [matrix], is_gated=True)
    assert not reads_rounded(few, [beside])
    assert reads_rounded(many, [matrix], is_gated=True)
    assert not reads_rounded(many, [four_bits])
    assert not reads_rounded(many.float(), [matrix])


def _compiled(
    config: LinearConfig, num_tokens: int, kind: LinearKind, *, num_beside: int = 0, num_groups: int = 0
):
    """Hopper's kernel for a configuration, compiled."""
    from kiln_nn.kernels.linear import triton_hopper_rounded as hopper

    constants = hopper.constants(config, num_tokens, num_beside, num_groups, is_gated=kind is G)
    tensors = {
        **weights_and_x("fp8e4nv", 128, constants, "fp8e4nv"),
        **boxes_of("bf16", 64, beside_desc=64, whole_x_desc=min(16, config.tokens)),
        **dict.fromkeys(("row_scales_ptr", "token_scales_ptr", "out_ptr"), "*fp32"),
    }
    return compile_for_hopper(hopper._linear_kernel, tensors, constants, warps=config.warps)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_the_kernel_for_hopper_compiles(kind):
    for config in (*CONFIGS[kind], *([UNPROMOTED] if kind is P else [])):
        num_beside = 64 if kind is P else 0
        binary = _compiled(config, 50, kind, num_beside=num_beside)
        assert binary.metadata.shared <= SHARED_MEMORY_LIMIT[90]
        ptx = binary.asm["ptx"]
        assert f"wgmma.mma_async.sync.aligned.m64n{config.tokens}k32.f32.e4m3.e4m3" in ptx
        assert (f"m64n{min(16, config.tokens)}k16.f32.bf16.bf16" in ptx) == (num_beside > 0)
        # Dependents start behind the wait, or before it, in programs of either kind.
        assert ptx.count("griddepcontrol.launch_dependents") == (4 if num_beside else 2)


@only_outside_interpreter
@needs_triton
def test_the_kernel_for_hopper_compiles_with_scales_of_groups():
    config = LinearConfig(16, 64, 256, 3, 4, 5, 8)  # that of out_proj
    whole_rows, by_group = (_compiled(config, 16, S, num_groups=number) for number in (0, 12))
    assert by_group.metadata.shared <= whole_rows.metadata.shared + 16 * 16 * 4 + 16
    ptx = by_group.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3" in ptx
    assert ".local" not in ptx
