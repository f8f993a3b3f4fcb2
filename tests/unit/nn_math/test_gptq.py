"""Rounding that makes up for its errors, on inputs whose statistics are known."""

import pytest
import torch

from kiln_nn.errors import InvalidQuantization
from kiln_nn.kernels.quantised import quantise_rtn
from kiln_nn.quantise import Curvature, gptq

INPUTS = 256


def correlated_inputs(num_tokens: int = 2048) -> torch.Tensor:
    """Tokens in a few directions, with outlier channels, as activations have them."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(32, INPUTS, generator=draw)
    x = torch.randn(num_tokens, 32, generator=draw) @ directions
    x += 0.1 * torch.randn(num_tokens, INPUTS, generator=draw)
    x[:, ::50] *= 10
    return x


def weight(num_outputs: int = 64) -> torch.Tensor:
    return 0.02 * torch.randn(num_outputs, INPUTS, generator=torch.Generator().manual_seed(1))


def output_error(quantised: torch.Tensor, exact: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (quantised - exact).t()).norm() / (x @ exact.t()).norm())


def test_outputs_move_far_less_than_by_rounding_to_nearest():
    x, exact = correlated_inputs(), weight()
    curvature = Curvature()
    for part in x.split(500):
        curvature.add(part)
    matrix = gptq(exact, curvature.inverse_factor())
    assert matrix.scheme == "int4"
    assert matrix.scales.dtype == torch.bfloat16
    calibrated = output_error(matrix.dequantise(torch.float32), exact, x)
    rounded = output_error(quantise_rtn(exact, "int4").dequantise(torch.float32), exact, x)
    assert calibrated < rounded / 3


def test_with_unrelated_inputs_it_is_rounding_to_nearest_with_tighter_scales():
    curvature = Curvature()
    curvature.add(torch.eye(INPUTS))
    exact = weight()
    matrix = gptq(exact, curvature.inverse_factor())
    nearest = (exact.unflatten(1, (-1, 128)) / matrix.scales.float()[..., None]).round().clamp(-8, 7)
    assert torch.equal(matrix.numbers(), nearest.flatten(1))
    plain = quantise_rtn(exact, "int4").dequantise(torch.float32)
    assert (matrix.dequantise(torch.float32) - exact).norm() < (plain - exact).norm()


def test_the_factor_inverts_the_damped_curvature():
    x = correlated_inputs(300)
    curvature = Curvature()
    curvature.add(x)
    factor = curvature.inverse_factor(damping=0.1).double()
    moments = x.double().t() @ x.double()
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(INPUTS, dtype=torch.float64), atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_inputs_that_never_occur_still_get_sensible_weights():
    x = correlated_inputs()
    x[:, 7] = 0
    curvature = Curvature()
    curvature.add(x)
    exact = weight()
    matrix = gptq(exact, curvature.inverse_factor())
    scale_O = matrix.scales.float()[:, 0]
    moved = (matrix.dequantise(torch.float32) - exact)[:, 7].abs()
    beyond_the_range = (exact[:, 7].abs() - 7 * scale_O).clamp_min(0)
    assert (moved <= 0.51 * scale_O + beyond_the_range).all()


def test_inputs_that_are_not_finite_are_refused():
    x = correlated_inputs(300)
    x[3, 5] = torch.inf
    curvature = Curvature()
    curvature.add(x)
    with pytest.raises(InvalidQuantization, match="no usable statistics"):
        curvature.inverse_factor()
