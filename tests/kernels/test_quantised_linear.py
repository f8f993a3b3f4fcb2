"""Linear layers over quantised weights against float64 products of the same weights made whole."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

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
from kiln_nn.kernels.linear.choice_quantised import WEIGHT_BITS, choose
from kiln_nn.kernels.linear.config import LinearKind, Tiling, check_rows, fit
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    relative_error,
    run_under_interpreter,
)

# One rounding to bf16, 2^-8 at worst (the interpreter cuts off instead), or float32 sums. The weights
# are exact in bf16 before they are scaled, so nothing else is lost.
TOLERANCE = {torch.bfloat16: 5e-3 if INTERPRETED else 4e-3, torch.float32: 2e-6 if INTERPRETED else 2e-5}
# With x rounded to three bits after the leading one, 2^-4 at worst and 2.6 % on average.
EIGHT_BIT_TOLERANCE = 4e-2
SMALL = LinearConfig(16, 32, 128, splits=2, warps=4, stages=3)
# Warps of one and of several groups, of which some have none, and programs past the last output; weights
# that wait in registers and in shared memory, in fewer places than a warp has groups and in as many.
REGISTERS = {
    "registers": RegisterConfig(16, splits=3, warps=4, ahead=2),
    "more registers": RegisterConfig(32, splits=2, warps=8, ahead=8, registers=128),
    "staged": RegisterConfig(32, splits=3, warps=4, ahead=2, is_staged=True),
    "more staged": RegisterConfig(16, splits=2, warps=8, ahead=9, registers=96, is_staged=True),
}
# Every number of warp groups and tiles, rings that come round, rows of weights in two boxes, scaled sums
# and weights.
SPECIALISED = {
    "small groups": SpecialisedConfig(32, 24, groups=2, splits=2, stages=2),
    "two groups": SpecialisedConfig(64, 32, groups=2, splits=1, stages=3),
    "three groups": SpecialisedConfig(128, 32, groups=3, splits=3, stages=3),
    "three tiles": SpecialisedConfig(64, 24, groups=2, splits=1, stages=2, tiles=3),
}
_fixed: RegisterConfig | SpecialisedConfig | None = None
TOKENS = [3, 17] if INTERPRETED else [1, 3, 16, 33, 64, 128, 300, 2048]
ODD = (34, 256) if INTERPRETED else (100, 384)
# The layers of Qwen3.5-4B by what becomes of their products.
SIZES = {
    LinearKind.PLAIN: [ODD] if INTERPRETED else [ODD, (10240, 2560), (12288, 2560)],
    LinearKind.GATED: [ODD] if INTERPRETED else [ODD, (18432, 2560)],
    LinearKind.PARTIAL: [ODD] if INTERPRETED else [ODD, (2560, 4096), (2560, 9216)],
}
SCHEMES = ["fp8", "int4"]


@cache
def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


@cache
def _matrix(scheme: str, num_outputs: int, num_inputs: int) -> QuantisedMatrix:
    return quantise_rtn(_draw(num_outputs, num_inputs, seed=1), scheme)


@cache
def _product(scheme: str, num_outputs: int, num_inputs: int, num_tokens: int) -> torch.Tensor:
    weight = _matrix(scheme, num_outputs, num_inputs).numbers()
    matrix = _matrix(scheme, num_outputs, num_inputs)
    weight = weight.double().unflatten(1, (matrix.scales.shape[1], -1)) * matrix.scales.double()[..., None]
    return _draw(num_tokens, num_inputs).double() @ weight.flatten(1).t()


def _quantised():
    from kiln_nn.kernels.linear import quantised

    return quantised


def _config(x: torch.Tensor, matrix: QuantisedMatrix, kind: LinearKind) -> Tiling:
    """A small one in the interpreter; on a GPU the chosen one, or that of any number of tokens."""
    if INTERPRETED:
        return SMALL
    if isinstance(_fixed, RegisterConfig) and kind is LinearKind.GATED:
        return replace(_fixed, outputs=_fixed.outputs // 2)  # the same rows
    if _fixed is not None:
        return _fixed
    is_hopper = _quantised().takes_hopper(x, matrix)
    chosen = choose(matrix.scheme, len(x), *matrix.shape, kind, is_hopper=is_hopper)
    return chosen or invariant_config(*matrix.shape, matrix.scheme)


KERNELS = {"plain": None, "hopper": None, **REGISTERS, **SPECIALISED}


@pytest.fixture(params=["plain"] if INTERPRETED else list(KERNELS))
def kernel(request, monkeypatch):
    """Runs one of the kernels: that of other GPUs also on Hopper, the chosen one, or one of the others."""
    monkeypatch.setattr(f"{__name__}._fixed", KERNELS[request.param])
    if request.param == "plain":
        monkeypatch.setattr(_quantised(), "takes_hopper", lambda x, w: False)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")

    def run(x: torch.Tensor, matrix: QuantisedMatrix, out: torch.Tensor, kind: LinearKind) -> torch.Tensor:
        if isinstance(_fixed, SpecialisedConfig) and matrix.scheme != "int4":
            pytest.skip("takes four bits")
        _quantised().launch(x, matrix, out, _config(x, matrix, kind), kind)
        return out

    return run


def _rounds_x(x: torch.Tensor, matrix: QuantisedMatrix, kind: LinearKind) -> bool:
    """Whether the kernel that is chosen here reads x in E4M3."""
    config = _config(x, matrix, kind)
    is_chosen = _fixed is None and not INTERPRETED and _quantised().takes_hopper(x, matrix)
    return is_chosen and isinstance(config, LinearConfig) and config.x_bits == 8


def _tolerance(scheme: str, num_tokens: int, dtype: torch.dtype) -> float:
    """Four-bit weights that meet many tokens are rounded to bf16 once they are scaled, but in registers."""
    is_scaled = (scheme == "int4" and num_tokens > 128 and _fixed is None) or _fixed in (
        SPECIALISED["three groups"],
        SPECIALISED["three tiles"],
    )
    return TOLERANCE[torch.bfloat16] if is_scaled else TOLERANCE[dtype]


def _poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@only_outside_interpreter
@needs_triton
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES[LinearKind.PLAIN])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme, num_tokens, size, out_dtype, kernel):
    if not INTERPRETED and out_dtype is torch.float32 and num_tokens not in (3, 300):
        pytest.skip("only the end of the kernel differs")
    x, matrix = _draw(num_tokens, size[1]), _matrix(scheme, *size)
    out = kernel(x, matrix, _poisoned(num_tokens, size[0], dtype=out_dtype), LinearKind.PLAIN)
    is_rounded = _rounds_x(x, matrix, LinearKind.PLAIN)
    tolerance = EIGHT_BIT_TOLERANCE if is_rounded else _tolerance(scheme, num_tokens, out_dtype)
    assert relative_error(out, _product(scheme, *size, num_tokens)) < tolerance


@on_triton
@pytest.mark.parametrize("size", SIZES[LinearKind.GATED])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gated_form(scheme, num_tokens, size, kernel):
    x, matrix = _draw(num_tokens, size[1]) / 8, _matrix(scheme, *size)
    out = kernel(x, matrix, _poisoned(num_tokens, size[0] // 2, dtype=torch.bfloat16), LinearKind.GATED)
    gate, up = (_product(scheme, *size, num_tokens) / 8).chunk(2, dim=1)
    is_rounded = _rounds_x(x, matrix, LinearKind.GATED)
    tolerance = EIGHT_BIT_TOLERANCE if is_rounded else TOLERANCE[torch.bfloat16]
    assert relative_error(out, F.silu(gate) * up) < tolerance


@on_triton
@pytest.mark.parametrize("size", SIZES[LinearKind.PARTIAL])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_partial_sums(scheme, num_tokens, size, kernel):
    x, matrix = _draw(num_tokens, size[1]), _matrix(scheme, *size)
    splits = _config(x, matrix, LinearKind.PARTIAL).splits
    out = _poisoned(splits, num_tokens, size[0], dtype=torch.float32)
    kernel(x, matrix, out, LinearKind.PARTIAL)
    is_rounded = _rounds_x(x, matrix, LinearKind.PARTIAL)
    tolerance = EIGHT_BIT_TOLERANCE if is_rounded else _tolerance(scheme, num_tokens, torch.float32)
    assert relative_error(out.double().sum(0), _product(scheme, *size, num_tokens)) < tolerance


@on_triton
def test_group_scales_in_float32(kernel):
    x, matrix = _draw(3, ODD[1]), _matrix("int4", *ODD)
    wide = QuantisedMatrix("int4", matrix.values, matrix.scales.float())
    out = kernel(x, wide, _poisoned(3, ODD[0], dtype=torch.float32), LinearKind.PLAIN)
    assert relative_error(out, _product("int4", *ODD, 3)) < _tolerance("int4", 3, torch.float32)


@on_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_lie_apart(scheme, kernel):
    num_rows, num_inputs = ODD[0] - 10, ODD[1]
    x, matrix = _draw(5, num_inputs + 128)[:, 128:], _matrix(scheme, *ODD).rows(8, 8 + num_rows)
    out = _poisoned(5, num_rows + 20, dtype=torch.bfloat16)
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
    x, matrix, beside = _draw(num_tokens, size[1]), _matrix(scheme, *size), _draw(num_beside, size[1], seed=2)
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
    x, matrix, beside = _draw(num_tokens, size[1]), _matrix(scheme, *size), _draw(num_beside, size[1], seed=2)
    out = _poisoned(num_tokens, size[0] + num_beside, dtype=torch.bfloat16)
    _quantised().launch(x, matrix, out, config, LinearKind.PLAIN, beside_BI=beside)
    assert relative_error(out[:, size[0] :], x.double() @ beside.double().t()) < TOLERANCE[torch.bfloat16]
    assert relative_error(out[:, : size[0]], _product(scheme, *size, num_tokens)) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the kernel is Hopper's")
@pytest.mark.parametrize("config", REGISTERS.values(), ids=REGISTERS)
@pytest.mark.parametrize("num_tokens", [1, 5, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_rows_beside_those_of_registers(scheme, num_tokens, config):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    x, matrix, beside = _draw(num_tokens, ODD[1]), _matrix(scheme, *ODD), _draw(6, ODD[1], seed=2)
    out = _poisoned(num_tokens, ODD[0] + len(beside), dtype=torch.bfloat16)
    _quantised().launch(x, matrix, out, config, LinearKind.PLAIN, beside_BI=beside)
    expected = torch.cat([_product(scheme, *ODD, num_tokens), x.double() @ beside.double().t()], dim=1)
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.parametrize("kind", list(LinearKind))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_invariant_row_does_not_depend_on_its_batch(scheme, kind, kernel, monkeypatch):
    size = ODD if INTERPRETED else (2560, 4096)
    config = SMALL if INTERPRETED else _fixed or invariant_config(*size, scheme)
    monkeypatch.setattr(f"{__name__}._config", lambda x, matrix, kind: config)
    matrix, x = _matrix(scheme, *size), _draw(70, size[1])

    def compute(x: torch.Tensor) -> torch.Tensor:
        splits = config.splits if kind is LinearKind.PARTIAL else 1
        outputs = size[0] // 2 if kind is LinearKind.GATED else size[0]
        out = _poisoned(splits, len(x), outputs, dtype=torch.float32)
        return kernel(x, matrix, out, kind)

    together = compute(x)
    for row in (0, 5, 69):
        assert torch.equal(compute(x[row : row + 1])[:, 0], together[:, row])
    assert torch.equal(compute(x[:6]), together[:, :6])


@on_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_weights(scheme):
    from kiln_nn.kernels.quantised import triton

    matrix = _matrix(scheme, *SIZES[LinearKind.PARTIAL][-1])
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
    x = _draw(7, 300)
    numbers, scales = quantise_rows(x)
    expected = quantise_rtn(x, "fp8")
    assert torch.allclose(scales, expected.scales, rtol=1e-6)
    assert relative_error(numbers.float() * scales, x.float()) < EIGHT_BIT_TOLERANCE
    assert (numbers.float() != expected.numbers()).float().mean() < 0.01  # where a quotient lies between


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs the library of a GPU")
@pytest.mark.parametrize("size", [(12288, 2560), (2560, 9216)])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library(scheme, num_tokens, size, monkeypatch):
    x, matrix = _draw(num_tokens, size[1]), _matrix(scheme, *size)
    monkeypatch.setattr(_quantised(), "choose", lambda *args, **options: None)
    expected = _product(scheme, *size, num_tokens)
    is_eight = _quantised().multiplies_eight_bits(x, matrix)
    # Weights rounded to bf16 again once scaled, or x rounded to E4M3.
    tolerance = EIGHT_BIT_TOLERANCE if is_eight else 6e-3
    assert relative_error(linear(x, matrix), expected) < tolerance
    assert relative_error(linear_partials(x, matrix).sum(0), expected) < tolerance
    gate, up = (expected / 8).chunk(2, dim=1)
    assert relative_error(linear_swiglu(x / 8, matrix), F.silu(gate) * up) < 2 * tolerance
    out = _poisoned(num_tokens, size[0] + 8, dtype=torch.bfloat16)
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


CHECKED = {
    (12288, 2560): LinearKind.PLAIN,
    (10240, 2560): LinearKind.PLAIN,
    (18432, 2560): LinearKind.GATED,
    (2560, 9216): LinearKind.PARTIAL,
    (2560, 4096): LinearKind.PARTIAL,
    (248320, 2560): LinearKind.PLAIN,
    (6144, 1024): LinearKind.GATED,
}
LIMITS = {True: 227 * 1024, False: 99 * 1024}


def _check_registers(
    config: RegisterConfig, scheme: str, num_tokens: int, size: tuple[int, int], kind: LinearKind
) -> None:
    """That x of all its tokens fits beside what waits, and that no warp of a split is without work."""
    hopper = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_registers")
    kinds = {"is_gated": kind is LinearKind.GATED, "is_four_bits": scheme == "int4"}
    constants = hopper.constants(config, num_tokens, *size, **kinds)
    assert 8 * constants["TILES"] >= min(num_tokens, 8)
    assert constants["STEPS"] * config.warps * config.splits - size[1] // 128 < config.warps * config.splits


@needs_triton
def test_what_does_not_fit_into_shared_memory_is_refused():
    hopper = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_registers")
    with pytest.raises(ValueError, match="more splits"):
        hopper.constants(RegisterConfig(16), 16, 2560, 17408 * 2, 0, is_gated=False, is_four_bits=True)


@pytest.mark.parametrize("is_hopper", [True, False])
@pytest.mark.parametrize(("size", "kind"), CHECKED.items())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_choice_fits_its_gpu(scheme, size, kind, is_hopper):
    for num_tokens in (*range(1, 300), 1024, 4096):
        config = choose(scheme, num_tokens, *size, kind, is_hopper=is_hopper)
        assert kind is LinearKind.PARTIAL or config is None or config.splits == 1
        if isinstance(config, RegisterConfig | SpecialisedConfig):
            check_rows(config, kind)
        if isinstance(config, RegisterConfig):
            _check_registers(config, scheme, num_tokens, size, kind)
        if isinstance(config, SpecialisedConfig):
            assert scheme == "int4"
            assert is_hopper
            assert config.fit(size[1], 2, LIMITS[True]) == config
            assert config.shared_memory_bytes(size[1]) <= LIMITS[True]
        if not isinstance(config, LinearConfig):
            continue
        limit = _quantised().ring_limit(
            quantise_rtn(torch.ones(1, 128).bfloat16(), scheme), LIMITS[is_hopper]
        )
        assert config.inputs % 128 == 0
        assert fit(config, kind, limit, WEIGHT_BITS[scheme]) == config
        blocks = -(-size[1] // config.inputs)
        assert -(-blocks // config.splits) * (config.splits - 1) < blocks, "a split has no inputs"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gate_and_up_have_the_same_tiles_in_the_plain_form(scheme):
    """Which adapters need; measured is the gated one, whose outputs are pairs of rows."""
    for num_tokens in (1, 16, 64, 200, 512):
        gated, plain = (
            choose(scheme, num_tokens, 18432, 2560, kind, is_hopper=True)
            for kind in (LinearKind.GATED, LinearKind.PLAIN)
        )
        assert plain == (gated and replace(gated, outputs=2 * gated.outputs))


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_they_compile_for_every_supported_gpu(capability, monkeypatch):
    from kiln_nn.kernels.linear import triton_quantised
    from kiln_nn.kernels.quantised import triton as whole

    monkeypatch.setattr(whole, "supports_dependent_launch", lambda device: capability >= 90)
    with compiling_instead_of_launching((capability,)) as compiled:
        for scheme in SCHEMES:
            matrix = quantise_rtn(torch.zeros(64, 256).bfloat16(), scheme)
            x, out = torch.zeros(16, 256).bfloat16(), torch.zeros(2, 16, 64)
            for kind in LinearKind:
                options = {"is_gated": kind is LinearKind.GATED, "is_dependent": capability >= 90}
                config = choose(scheme, 16, 64, 256, kind, is_hopper=False)
                triton_quantised.launch(x, matrix, out, config, **options)
            whole.dequantise(matrix, torch.bfloat16)
        if capability >= 89:
            whole.quantise_rows(x)
    assert len(compiled) == 8 + (capability >= 89)
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[capability] for one in compiled)


def _hopper_shared_memory(
    scheme: str,
    config: LinearConfig,
    num_tokens: int,
    size: tuple[int, int],
    kind: LinearKind,
    *,
    num_beside: int = 0,
    scales: str = "*bf16",
) -> int:
    """Compile Hopper's kernel for a configuration; the bytes of shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kiln_nn.kernels.linear import triton_hopper_quantised as hopper
    from kiln_nn.kernels.linear.triton_hopper_parts import line_layout

    is_four_bits, is_gated = scheme == "int4", kind is LinearKind.GATED
    kinds = {"is_gated": is_gated, "is_four_bits": is_four_bits}
    constants = hopper.constants(config, num_tokens, size[1], num_beside, **kinds)
    kind_of_word, columns, bits = ("i32", 16, 32) if is_four_bits else ("i16", 64, 16)
    stored, whole = line_layout(columns, bits), line_layout(64, 16)
    box, rest, x_box, x_rest = (constants[name] for name in ("BOX", "REST", "X_BOX", "X_REST"))
    signature = {
        "box_desc": f"tensordesc<{kind_of_word}[{box}, {columns}],{stored!r}>",
        "rest_desc": f"tensordesc<{kind_of_word}[{rest or box}, {columns}],{stored!r}>",
        "x_desc": f"tensordesc<bf16[{x_box}, 64],{whole!r}>",
        "x_rest_desc": f"tensordesc<bf16[{x_rest or x_box}, 64],{whole!r}>",
        "beside_desc": f"tensordesc<bf16[64, 64],{whole!r}>",
        "beside_x_desc": f"tensordesc<bf16[{min(16, config.tokens)}, 64],{whole!r}>",
        "scales_ptr": scales if is_four_bits else "*fp32",
        "out_ptr": "*fp32",
        "x_ptr": "*bf16",
        "beside_ptr": "*bf16",
    }
    kernel = hopper._linear_kernel
    signature |= {
        name: "i32" for name in kernel.arg_names if name.islower() and name not in signature | constants
    }
    constants |= {"DEPENDENT": True}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    options = {"num_warps": config.warps, "launch_pdl": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # Weights go from memory to registers as they are wanted there, without a way through other threads.
    assert num_beside or "shfl" not in binary.asm["ptx"]
    # One kernel for steps with and without adapters: dependents start behind the wait, or before it.
    assert binary.asm["ptx"].count("griddepcontrol.launch_dependents") == (4 if num_beside else 2)
    return binary.metadata.shared


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(("size", "kind"), list(CHECKED.items())[::2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_for_hopper_compiles(scheme, size, kind):
    for num_tokens in (1, 64, 256):
        config = choose(scheme, num_tokens, *size, kind, is_hopper=True)
        if isinstance(config, LinearConfig):
            assert _hopper_shared_memory(scheme, config, num_tokens, size, kind) <= SHARED_MEMORY_LIMIT[90]
    config = invariant_config(*size, scheme)
    others = {"num_beside": 64 if kind is LinearKind.PLAIN else 0, "scales": "*fp32"}
    alone = _hopper_shared_memory(scheme, config, 1, size, kind, **others)
    assert alone <= SHARED_MEMORY_LIMIT[90]
    # Rows beside take no memory that the others have not.
    assert _hopper_shared_memory(scheme, config, 64, size, kind, **others) == alone


def _compile_specialised(
    config: SpecialisedConfig, num_tokens: int, size: tuple[int, int], kind: LinearKind, scales: str
):
    """Compile Hopper's kernel of specialised warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kiln_nn.kernels.linear import triton_hopper_specialised as hopper
    from kiln_nn.kernels.linear.triton_hopper_parts import line_layout

    constants = hopper.constants(config, num_tokens, size[1], is_gated=kind is LinearKind.GATED)
    stored, whole = line_layout(16, 32), line_layout(64, 16)
    box, rest, x_box, x_rest = (constants[name] for name in ("BOX", "REST", "X_BOX", "X_REST"))
    signature = {
        "box_desc": f"tensordesc<i32[{box}, 16],{stored!r}>",
        "rest_desc": f"tensordesc<i32[{rest or box}, 16],{stored!r}>",
        "x_desc": f"tensordesc<bf16[{x_box}, 64],{whole!r}>",
        "x_rest_desc": f"tensordesc<bf16[{x_rest or x_box}, 64],{whole!r}>",
        "scales_ptr": scales,
        "out_ptr": "*fp32",
    }
    kernel = hopper._linear_kernel
    signature |= {
        name: "i32" for name in kernel.arg_names if name.islower() and name not in signature | constants
    }
    constants |= {"DEPENDENT": True}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    options = {"num_warps": 4, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_the_kernel_of_specialised_warps_compiles(kind):
    size = next(size for size, checked in CHECKED.items() if checked is kind)
    config, scales = {
        LinearKind.PLAIN: (SpecialisedConfig(64, 48, groups=3, stages=12), "*bf16"),
        LinearKind.GATED: (SpecialisedConfig(64, 32, groups=3, tiles=3, stages=12), "*bf16"),
        LinearKind.PARTIAL: (SpecialisedConfig(256, 64, groups=2, splits=4, stages=12), "*fp32"),
    }[kind]
    scale_bytes = 4 if scales == "*fp32" else 2
    config = config.fit(size[1], scale_bytes, SHARED_MEMORY_LIMIT[90])
    assert config.groups <= config.stages < 12
    binary = _compile_specialised(config, config.tokens, size, kind, scales)
    # Weights go from memory to registers as they are wanted there; a warp only asks for its own number.
    shuffles = [line for line in binary.asm["ptx"].splitlines() if "shfl" in line]
    assert all(line.endswith(", 0, 31, -1;") for line in shuffles)
    assert binary.asm["ptx"].count("griddepcontrol.launch_dependents") == 2
    planned = config.shared_memory_bytes(size[1], scale_bytes)
    assert binary.metadata.shared <= planned <= SHARED_MEMORY_LIMIT[90]
    # The groups that multiply, and four warps of which one fetches.
    assert binary.metadata.num_warps == 4 * (config.groups + 1)


def _compile_for_registers(
    scheme: str,
    config: RegisterConfig,
    num_tokens: int,
    size: tuple[int, int],
    kind: LinearKind,
    *,
    num_beside: int = 0,
    scales: str = "*bf16",
) -> str:
    """The machine code of Hopper's kernel without a ring, in PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kiln_nn.kernels.linear import triton_hopper_registers as hopper

    is_four_bits = scheme == "int4"
    kinds = {"is_gated": kind is LinearKind.GATED, "is_four_bits": is_four_bits}
    constants = hopper.constants(config, num_tokens, *size, num_beside, **kinds) | {"DEPENDENT": True}
    signature = {
        "x_ptr": "*bf16",
        "values_ptr": "*i32",
        "scales_ptr": scales if is_four_bits else "*fp32",
        "out_ptr": "*fp32",
        "beside_ptr": "*bf16",
    }
    kernel = hopper._linear_kernel
    signature |= {
        name: "i32" for name in kernel.arg_names if name.islower() and name not in signature | constants
    }
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    options = {"num_warps": config.warps, "launch_pdl": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert binary.metadata.shared <= SHARED_MEMORY_LIMIT[90]
    return binary.asm["ptx"]


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_without_a_ring_compiles(scheme, kind):
    size = next(size for size, checked in CHECKED.items() if checked is kind)
    config = RegisterConfig(32, splits=2 if kind is LinearKind.PARTIAL else 1, warps=4, ahead=2)
    ptx = _compile_for_registers(scheme, config, 1, size, kind)
    assert ptx.count("shfl") == (4 if scheme == "int4" else 0)  # for minus eight
    weights = "ld.global.nc.L1::no_allocate.v4.b32"
    before, _ = ptx.split("griddepcontrol.wait;")
    # Of two groups and stripes, 16 rows each; all else only when x is there.
    num_fetches = 2 * 2 * 2 * (2 if kind is LinearKind.GATED else 1) * (2 if scheme == "fp8" else 1)
    assert before.count(weights) == num_fetches
    assert "mma.sync" not in before
    assert ptx.count("griddepcontrol.launch_dependents") == 2
    others = {"num_beside": 64 if kind is LinearKind.PLAIN else 0, "scales": "*fp32"}
    for config in REGISTERS.values():
        _compile_for_registers(scheme, config, 17, ODD, kind, **others)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SpecialisedConfig(64, 64), LinearKind.GATED),
        (SpecialisedConfig(64, 40), LinearKind.GATED),
        (RegisterConfig(64), LinearKind.GATED),
        (RegisterConfig(8), LinearKind.PLAIN),
        (RegisterConfig(8), LinearKind.PARTIAL),
    ],
)
def test_tiles_without_room_for_their_rows_are_refused(config, kind):
    matrix, x = quantise_rtn(torch.ones(128, 256).bfloat16(), "int4"), torch.zeros(3, 256).bfloat16()
    with pytest.raises(ValueError, match=rf"{config.outputs} outputs of the {kind.value} form .* rows"):
        _quantised().launch(x, matrix, torch.zeros(1, 3, 128), config, kind)


def test_specialised_warps_that_do_not_fit_are_refused_with_numbers():
    config = SpecialisedConfig(256, 64, groups=3, tiles=3, stages=12)
    with pytest.raises(ValueError, match=r"wants \d+ bytes of shared memory for 2560 inputs"):
        config.fit(2560, 2, 227 * 1024)
