"""What stands for a quantised matrix, and rounding to the nearest."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn
from kiln_nn.kernels.quantised.matrix import pack_int4, transposed_words

SCHEMES = ["fp8", "int4"]
FORMATS = [torch.bfloat16, torch.float32]


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def test_a_word_holds_every_eighth_of_64_inputs_lowest_bits_first():
    numbers = torch.zeros(1, 64, dtype=torch.int64)
    numbers[0, 3::8] = torch.tensor([-8, -7, 0, 1, 2, 3, 6, 7])
    words = pack_int4(numbers)
    assert words[0, 3].item() & 0xFFFFFFFF == 0xFEBA9810
    in_a_row = transposed_words(words)
    assert [word & 15 for word in (in_a_row[0] >> 12).tolist()] == [0, 1, 8, 9, 10, 11, 14, 15]
    assert torch.equal(transposed_words(in_a_row), words)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_again_changes_nothing(scheme, dtype):
    weight = _draw(32, 384, dtype=dtype)
    weight[3], weight[4, :128] = 0, 0
    first = quantise_rtn(weight, scheme)
    second = quantise_rtn(first.dequantise(torch.float32), scheme)
    assert torch.equal(first.numbers(), second.numbers())
    # The second time scales are not rounded to bf16, which keeps eight bits.
    assert torch.allclose(first.scales.float(), second.scales, rtol=2**-8)
    assert first.dequantise(dtype)[3].count_nonzero() == 0


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_moves_by_half_a_step_at_most(scheme, dtype):
    weight = _draw(32, 384, dtype=dtype).float()
    matrix = quantise_rtn(weight.to(dtype), scheme)
    moved = (matrix.dequantise(torch.float32) - weight).abs()
    if scheme == "int4":
        half_steps = matrix.scales.float().repeat_interleave(128, 1) / 2
    else:
        # Three bits follow the leading one; the least numbers lie 2^-9 apart.
        half_steps = torch.maximum(weight.abs() * 2**-4, matrix.scales * 2**-10)
    # A scale rounded to bf16 may leave a group's largest a little outside.
    assert (moved <= half_steps * 1.03).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_views(scheme):
    matrix = quantise_rtn(_draw(32, 256), scheme)
    part = matrix.rows(5, 9)
    assert part.shape == (4, 256)
    assert part.values.data_ptr() == matrix.values[5].data_ptr()
    assert torch.equal(part.dequantise(torch.float32), matrix.dequantise(torch.float32)[5:9])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match="weight"):
        quantise_rtn(_draw(4, 100), "int4")
    with pytest.raises(ShapeMismatch, match="scales"):
        QuantisedMatrix("fp8", torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(3, 1))
    with pytest.raises(ShapeMismatch, match="values"):
        QuantisedMatrix("int4", torch.zeros(4, 20, dtype=torch.int32), torch.ones(4, 1))
