"""Four-bit weights with x in E4M3, and the order of its inputs, against float64 products of the rounded rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.linear import (
    SpecialisedConfig,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
    quantised,
    reads_rounded,
)
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import QuantisedMatrix, Rows, quantise_rtn, round_rows, whole
from kiln_nn.kernels.quantised.matrix import pack_int4, word_order
from tests.support.hopper_compiler import boxes_of, compile_for_hopper, weights_and_x
from tests.support.quantised_linears import draw, drawn_matrix, poisoned
from tests.support.triton_kernels import (
    SHARED_MEMORY_LIMIT,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    relative_error,
)

# One rounding to bf16; in float32 what tensor cores lose of sums of 128 inputs.
BF16_TOLERANCE, SHORT_TOLERANCE = 4e-3, 1e-3
P, G, S = LinearKind.PLAIN, LinearKind.GATED, LinearKind.PARTIAL
# Two and three groups, tiles of one box and of two, sums that are scaled at once and behind a block, and
# rings that come round; the last two have the most sums that registers hold.
CONFIGS = {
    P: [
        SpecialisedConfig(64, 48, groups=3, stages=6, x_bits=8),
        SpecialisedConfig(128, 64, groups=2, stages=5, x_bits=8),
    ],
    G: [
        SpecialisedConfig(16, 24, groups=2, stages=4, x_bits=8),
        SpecialisedConfig(128, 32, groups=3, stages=7, x_bits=8),
    ],
    S: [
        SpecialisedConfig(32, 40, groups=2, splits=2, stages=4, x_bits=8),
        SpecialisedConfig(128, 64, groups=3, splits=3, stages=6, x_bits=8),
    ],
}
SIZES = {P: (12288, 2560), G: (18432, 2560), S: (2560, 9216)}
ODD = {P: (100, 384), G: (100, 384), S: (100, 1152)}
# Some of a tile's tokens, all of one, and several programs.
CASES = [
    (kind, config, sizes, num_tokens)
    for kind in CONFIGS
    for config in CONFIGS[kind]
    for sizes, counts in ((ODD, (1, 17, 100)), (SIZES, (64, 300)))
    for num_tokens in counts
]


def _product(x: torch.Tensor, matrix: QuantisedMatrix) -> torch.Tensor:
    """Of x rounded to E4M3."""
    rows = round_rows(x)
    numbers = matrix.numbers().double().unflatten(1, (matrix.scales.shape[1], -1))
    weight = (numbers * matrix.scales.double()[..., None]).flatten(1)
    return rows.dequantise(torch.float64) @ weight.t()


def _needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def _launch(
    x: Rows,
    matrix: QuantisedMatrix,
    config: SpecialisedConfig,
    kind: LinearKind,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    splits = (config.splits,) if kind is S else ()
    out = poisoned(*splits, x.shape[0], matrix.shape[0] // (2 if kind is G else 1), dtype=dtype)
    quantised.launch(x, matrix, out, config, kind)
    return out


@on_triton
@pytest.mark.parametrize(("kind", "config", "sizes", "num_tokens"), CASES)
def test_products(kind, config, sizes, num_tokens):
    _needs_hopper()
    size = sizes[kind]
    x, matrix = draw(num_tokens, size[1]) / 8, drawn_matrix("int4", *size)
    expected = _product(x, matrix)
    if kind is G:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    out = _launch(x, matrix, config, kind)
    assert relative_error(out.double().sum(0) if kind is S else out, expected) < SHORT_TOLERANCE
    if kind is not S:
        out = _launch(x, matrix, config, kind, torch.bfloat16)
        assert relative_error(out, expected) < BF16_TOLERANCE


@on_triton
def test_weights_and_inputs_meet_exactly():
    """Small whole numbers have no rounding anywhere: whatever meets another input shows."""
    _needs_hopper()
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (192, 1024), generator=generator)
    scales = torch.randint(1, 5, (192, 8), generator=generator).bfloat16()
    x = torch.randint(-7, 8, (80, 1024), generator=generator).bfloat16()
    x[:, 0] = 7.0  # the largest number of every row: 448 times 2^-6, so that all are exact in E4M3
    x, matrix = x.to("cuda"), QuantisedMatrix("int4", pack_int4(numbers).to("cuda"), scales.to("cuda"))
    expected = x.double() @ matrix.dequantise(torch.float32).double().t()
    for config in CONFIGS[P]:
        assert relative_error(_launch(x, matrix, config, P), expected) < 1e-6


@on_triton
def test_group_scales_in_float32():
    _needs_hopper()
    x, matrix = draw(3, 384), drawn_matrix("int4", *ODD[P])
    wide = QuantisedMatrix("int4", matrix.values, matrix.scales.float())
    for config in CONFIGS[P]:
        assert torch.equal(_launch(x, wide, config, P), _launch(x, matrix, config, P))


@on_triton
@pytest.mark.parametrize("config", CONFIGS[P])
def test_rows_that_lie_apart(config):
    _needs_hopper()
    x, matrix = draw(5, 512)[:, 128:], drawn_matrix("int4", *ODD[P]).rows(8, 98)
    out = poisoned(5, 110, dtype=torch.bfloat16)
    quantised.launch(x, matrix, out[:, 16:-4], config, P)
    assert relative_error(out[:, 16:-4], _product(x, matrix)) < BF16_TOLERANCE
    assert out[:, :16].isnan().all()
    assert out[:, -4:].isnan().all()


@on_triton
@pytest.mark.parametrize("num_beside", [32, 96])
@pytest.mark.parametrize("num_tokens", [3, 64, 300])
def test_whole_rows_beside(num_tokens, num_beside):
    _needs_hopper()
    size = (1024, 2560)
    x, matrix, beside = draw(num_tokens, size[1]), drawn_matrix("int4", *size), draw(96, size[1], seed=2)
    beside = beside[:num_beside]
    for config in CONFIGS[P]:
        out = poisoned(num_tokens, size[0] + num_beside, dtype=torch.bfloat16)
        quantised.launch(round_rows(x, "words"), matrix, out, config, P, beside_BI=beside)
        # From x before it was rounded.
        assert relative_error(out[:, size[0] :], x.double() @ beside.double().t()) < BF16_TOLERANCE
        assert relative_error(out[:, : size[0]], _product(x, matrix)) < BF16_TOLERANCE


@on_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_a_row_does_not_depend_on_its_batch(kind):
    _needs_hopper()
    matrix, x = drawn_matrix("int4", 2560, 4096), draw(70, 4096)
    for config in CONFIGS[kind]:
        together = _launch(x, matrix, config, kind)
        for row in (0, 5, 69):
            assert torch.equal(
                _launch(x[row : row + 1], matrix, config, kind)[..., 0, :], together[..., row, :]
            )


@on_triton
def test_rows_rounded_before_give_the_same_bits():
    """Whoever rounds, and rows rounded for others are rounded again."""
    _needs_hopper()
    x, matrix, beside = draw(70, 2560), drawn_matrix("int4", 18432, 2560), draw(64, 2560, seed=2)
    for kind in (P, G):
        config = CONFIGS[kind][1]
        expected = _launch(x, matrix, config, kind, torch.bfloat16)
        for order in ("words", "plain"):
            assert torch.equal(_launch(round_rows(x, order), matrix, config, kind, torch.bfloat16), expected)
    rows = round_rows(x, "words")
    assert torch.equal(linear_beside(rows, [matrix, beside]), linear_beside(x, [matrix, beside]))


def test_words_hold_inputs_in_their_order():
    """Byte `m` of a word has places 2 m and 2 m + 1: what masks make of words is how x lies."""
    numbers = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0))
    words = pack_int4(numbers).view(3, 4, 8)
    masked = torch.stack([words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F], dim=2)
    assert torch.equal(masked.view(torch.uint8).flatten(1).int() - 8, word_order(numbers).int())


def test_on_a_cpu_rounded_rows_are_read_whole():
    x, matrix, beside = torch.randn(5, 256), quantise_rtn(torch.randn(16, 256), "int4"), torch.randn(4, 256)
    rows = round_rows(x, "words")
    assert whole(rows) is x
    assert round_rows(rows, "words") is rows
    plain = round_rows(rows)
    assert plain.order == "plain"
    assert torch.equal(word_order(plain.numbers_TI.float()), rows.numbers_TI.float())
    assert torch.equal(linear(rows, matrix), linear(x, matrix))
    assert torch.equal(linear_swiglu(rows, matrix), linear_swiglu(x, matrix))
    assert torch.equal(linear_partials(rows, matrix), linear_partials(x, matrix))
    assert torch.equal(linear_beside(rows, [matrix, beside]), linear_beside(x, [matrix, beside]))
    assert reads_rounded(x, [matrix, beside]) is None


@needs_triton
def test_who_reads_rows_in_the_order_of_words(monkeypatch):
    choices = {P: CONFIGS[P][0], G: replace(CONFIGS[G][1], x_bits=16)}
    monkeypatch.setattr(quantised, "takes_triton", lambda *tensors: True)
    monkeypatch.setattr(quantised, "takes_hopper", lambda x, matrix: True)
    monkeypatch.setattr(quantised, "choose", lambda scheme, tokens, *size, is_hopper: choices[size[2]])
    x, matrix = torch.zeros(9, 256).bfloat16(), quantise_rtn(torch.randn(64, 256).bfloat16(), "int4")
    assert reads_rounded(x, [matrix, torch.zeros(4, 256)]) == "words"
    assert reads_rounded(x, [matrix], is_gated=True) is None


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_the_kernel_for_hopper_compiles(kind):
    from kiln_nn.kernels.linear import triton_hopper_specialised as hopper

    for config in CONFIGS[kind]:
        num_beside = 64 if kind is P else 0
        constants = hopper.constants(config, 50, SIZES[kind][1], num_beside, is_gated=kind is G)
        tensors = {
            **weights_and_x("i32", 16, constants, "fp8e4nv"),
            **boxes_of("bf16", 64, beside_desc=64, whole_x_desc=hopper.beside_tokens(config)),
        }
        tensors |= {"scales_ptr": "*bf16", "token_scales_ptr": "*fp32", "out_ptr": "*fp32"}
        binary = compile_for_hopper(hopper._linear_kernel, tensors, constants, warps=4)
        planned = config.shared_memory_bytes(SIZES[kind][1])
        assert binary.metadata.shared <= planned <= SHARED_MEMORY_LIMIT[90]
        ptx = binary.asm["ptx"]
        assert f"wgmma.mma_async.sync.aligned.m64n{config.tokens}k32.f32.e4m3.e4m3" in ptx
        # Weights go from memory to the registers of products; a warp only asks for its own number.
        shuffles = [line for line in ptx.splitlines() if "shfl" in line]
        assert all(line.endswith(", 0, 31, -1;") for line in shuffles)
        assert ("k16.f32.bf16.bf16" in ptx) == (num_beside > 0)
        # Dependents start behind the wait, or before it, in programs of either kind.
        assert ptx.count("griddepcontrol.launch_dependents") == (4 if num_beside else 2)
