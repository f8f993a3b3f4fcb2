"""Hopper's kernels of few tokens and of specialised warps, with tiles that reach all of their code.

Those that are chosen run in test_quantised_linear.py. The numbers of tokens are those that they are for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.linear import RegisterConfig, SpecialisedConfig, quantised
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import QuantisedMatrix
from tests.support.quantised_linears import (
    ODD,
    REGISTERS,
    SCHEMES,
    SPECIALISED,
    TOLERANCE,
    draw,
    drawn_matrix,
    poisoned,
    product,
)
from tests.support.triton_kernels import on_triton, relative_error

Config = RegisterConfig | SpecialisedConfig
# One token, some of a tile, more than a program's; all of a tile's or several programs.
FEW, MANY = (1, 3, 33), (33, 300)
KERNELS = [
    *(
        pytest.param(config, scheme, id=f"{name} {scheme}")
        for name, config in REGISTERS.items()
        for scheme in SCHEMES
    ),
    *(pytest.param(config, "int4", id=name) for name, config in SPECIALISED.items()),
]
each_kernel = pytest.mark.parametrize(("config", "scheme"), KERNELS)


@pytest.fixture(autouse=True)
def _needs_hopper():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def _cases(config: Config, size: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """Numbers of tokens and sizes: programs past the last output, and a layer whose tiles are whole."""
    is_of_few = isinstance(config, RegisterConfig)
    return [
        *((num_tokens, ODD) for num_tokens in (FEW if is_of_few else MANY)),
        (3 if is_of_few else 128, size),
    ]


def _of(config: Config, kind: LinearKind) -> Config:
    """The same rows of weights in the gated form."""
    if isinstance(config, RegisterConfig) and kind is LinearKind.GATED:
        return replace(config, outputs=config.outputs // 2)
    return config


def _launch(
    x: torch.Tensor, matrix: QuantisedMatrix, config: Config, kind: LinearKind, dtype: torch.dtype
) -> torch.Tensor:
    splits = (config.splits,) if kind is LinearKind.PARTIAL else ()
    num_outputs = matrix.shape[0] // (2 if kind is LinearKind.GATED else 1)
    out = poisoned(*splits, len(x), num_outputs, dtype=dtype)
    quantised.launch(x, matrix, out, _of(config, kind), kind)
    return out


def _tolerance(config: Config, dtype: torch.dtype) -> float:
    """Where specialised warps scale the weights these are rounded to bf16."""
    if isinstance(config, SpecialisedConfig):
        from kiln_nn.kernels.linear.triton_hopper_specialised import scales_weights

        return TOLERANCE[torch.bfloat16 if scales_weights(config) else dtype]
    return TOLERANCE[dtype]


@on_triton
@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(config, scheme, dtype):
    for num_tokens, size in _cases(config, (12288, 2560)):
        x, matrix = draw(num_tokens, size[1]), drawn_matrix(scheme, *size)
        out = _launch(x, matrix, config, LinearKind.PLAIN, dtype)
        assert relative_error(out, product(scheme, *size, num_tokens)) < _tolerance(config, dtype)


@on_triton
@each_kernel
def test_the_gated_form(config, scheme):
    for num_tokens, size in _cases(config, (18432, 2560)):
        x, matrix = draw(num_tokens, size[1]) / 8, drawn_matrix(scheme, *size)
        out = _launch(x, matrix, config, LinearKind.GATED, torch.bfloat16)
        gate, up = (product(scheme, *size, num_tokens) / 8).chunk(2, dim=1)
        assert relative_error(out, F.silu(gate) * up) < TOLERANCE[torch.bfloat16]


@on_triton
@each_kernel
def test_partial_sums(config, scheme):
    for num_tokens, size in _cases(config, (2560, 9216)):
        x, matrix = draw(num_tokens, size[1]), drawn_matrix(scheme, *size)
        out = _launch(x, matrix, config, LinearKind.PARTIAL, torch.float32)
        error = relative_error(out.double().sum(0), product(scheme, *size, num_tokens))
        assert error < _tolerance(config, torch.float32)


@on_triton
@pytest.mark.parametrize("config", [*REGISTERS.values(), *SPECIALISED.values()])
def test_group_scales_in_float32(config):
    x, matrix = draw(3, ODD[1]), drawn_matrix("int4", *ODD)
    wide = QuantisedMatrix("int4", matrix.values, matrix.scales.float())
    out = _launch(x, wide, config, LinearKind.PLAIN, torch.float32)
    assert relative_error(out, product("int4", *ODD, 3)) < _tolerance(config, torch.float32)


@on_triton
@each_kernel
def test_rows_that_lie_apart(config, scheme):
    x, matrix = draw(5, ODD[1] + 128)[:, 128:], drawn_matrix(scheme, *ODD).rows(8, ODD[0] - 2)
    out = poisoned(5, ODD[0] + 10, dtype=torch.bfloat16)
    quantised.launch(x, matrix, out[:, 16:-4], config, LinearKind.PLAIN)
    expected = x.double() @ matrix.dequantise(torch.float32).double().t()
    assert relative_error(out[:, 16:-4], expected) < TOLERANCE[torch.bfloat16]
    assert out[:, :16].isnan().all()
    assert out[:, -4:].isnan().all()


@on_triton
@each_kernel
@pytest.mark.parametrize("kind", list(LinearKind))
def test_a_row_does_not_depend_on_its_batch(config, scheme, kind):
    matrix, x = drawn_matrix(scheme, 2560, 4096), draw(70, 4096)
    together = _launch(x, matrix, config, kind, torch.float32)
    for row in (0, 5, 69):
        alone = _launch(x[row : row + 1], matrix, config, kind, torch.float32)
        assert torch.equal(alone[..., 0, :], together[..., row, :])
    assert torch.equal(_launch(x[:6], matrix, config, kind, torch.float32), together[..., :6, :])


@on_triton
@pytest.mark.parametrize("config", REGISTERS.values(), ids=REGISTERS)
@pytest.mark.parametrize("num_tokens", [1, 5, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_rows_beside_those_of_few_tokens(scheme, num_tokens, config):
    x, matrix, beside = draw(num_tokens, ODD[1]), drawn_matrix(scheme, *ODD), draw(6, ODD[1], seed=2)
    out = poisoned(num_tokens, ODD[0] + len(beside), dtype=torch.bfloat16)
    quantised.launch(x, matrix, out, config, LinearKind.PLAIN, beside_BI=beside)
    expected = torch.cat([product(scheme, *ODD, num_tokens), x.double() @ beside.double().t()], dim=1)
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]
