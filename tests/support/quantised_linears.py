"""Tensors, layers and tolerances for tests of linear layers over quantised weights."""

from __future__ import annotations

from functools import cache

import torch

from kiln_nn.kernels.linear import LinearConfig, RegisterConfig, SpecialisedConfig
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn
from tests.support.triton_kernels import DEVICE, INTERPRETED

SCHEMES = ["fp8", "int4"]
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
ODD = (34, 256) if INTERPRETED else (100, 384)
# Layers of Qwen3.5-4B and one of a smaller model, by what becomes of their products.
LAYERS = {
    (12288, 2560): LinearKind.PLAIN,
    (10240, 2560): LinearKind.PLAIN,
    (18432, 2560): LinearKind.GATED,
    (2560, 9216): LinearKind.PARTIAL,
    (2560, 4096): LinearKind.PARTIAL,
    (248320, 2560): LinearKind.PLAIN,
    (6144, 1024): LinearKind.GATED,
}


@cache
def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in bf16, the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


@cache
def drawn_matrix(scheme: str, num_outputs: int, num_inputs: int) -> QuantisedMatrix:
    """Rounded normal numbers."""
    return quantise_rtn(draw(num_outputs, num_inputs, seed=1), scheme)


@cache
def product(scheme: str, num_outputs: int, num_inputs: int, num_tokens: int) -> torch.Tensor:
    """In float64, of `draw` and `drawn_matrix`."""
    matrix = drawn_matrix(scheme, num_outputs, num_inputs)
    numbers = matrix.numbers().double().unflatten(1, (matrix.scales.shape[1], -1))
    weight = (numbers * matrix.scales.double()[..., None]).flatten(1)
    return draw(num_tokens, num_inputs).double() @ weight.t()


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN wherever a kernel does not write."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
