"""Linear layers over quantised weights: own kernels while few tokens share the reading of the weights.

With many tokens E4M3 weights meet x in E4M3 too, a scale for each token, in an own kernel on Hopper or
on GPUs whose library does that; otherwise the weights are made bf16 again, in memory that is given back
at once. x is rounded by who made it (`RoundedRows`), or else in front of the product.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from kiln_nn.kernels.dispatch import device_limits, takes_triton
from kiln_nn.kernels.linear import reference
from kiln_nn.kernels.linear.choice_quantised import WEIGHT_BITS, choose
from kiln_nn.kernels.linear.config import (
    LinearConfig,
    LinearKind,
    RegisterConfig,
    SpecialisedConfig,
    Tiling,
    check_rows,
    fit,
)
from kiln_nn.kernels.quantised import (
    InputOrder,
    QuantisedMatrix,
    RoundedRows,
    Rows,
    round_groups,
    round_rows,
    whole,
)
from kiln_nn.kernels.swiglu import swiglu

_MOST_GROUPS = 128  # of a program's inputs
_MOST_GROUP_SCALES = 128 * _MOST_GROUPS  # of a program's rows and groups, beside its ring
_BARRIERS_BYTES = 1024
# Of a tile whose x has a scale for each 128 inputs: a step of 16 rows takes 1.9 % less with them, one of 64 no less.
_MOST_TOKENS_WITH_GROUP_SCALES = 16


def linear(
    x: Rows,
    matrix: QuantisedMatrix,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: Tiling | None = None,
    shows_producers: bool = False,
) -> torch.Tensor:
    """As `kernels.linear.linear`."""
    x_TI = whole(x)
    tiling = _tiling(x_TI, matrix, config, LinearKind.PLAIN)
    if tiling is None:
        return library_linear(x, matrix, out_dtype=out_dtype, out=out)
    out_TO = out
    if out_TO is None:
        out_TO = x_TI.new_empty((x_TI.shape[0], matrix.shape[0]), dtype=out_dtype or x_TI.dtype)
    launch(x, matrix, out_TO, tiling, LinearKind.PLAIN, shows_producers=shows_producers)
    return out_TO


def linear_swiglu(x: Rows, matrix: QuantisedMatrix, *, config: Tiling | None = None) -> torch.Tensor:
    """As `kernels.linear.linear_swiglu`."""
    x_TI = whole(x)
    tiling = _tiling(x_TI, matrix, config, LinearKind.GATED)
    if tiling is None:
        return swiglu(*library_linear(x, matrix).chunk(2, dim=-1))
    out_TF = x_TI.new_empty((x_TI.shape[0], matrix.shape[0] // 2))
    launch(x, matrix, out_TF, tiling, LinearKind.GATED)
    return out_TF


def linear_partials(
    x: Rows,
    matrix: QuantisedMatrix,
    *,
    config: Tiling | None = None,
    shows_producers: bool = False,
) -> torch.Tensor:
    """As `kernels.linear.linear_partials`; the kernels' sums always stay apart."""
    x_TI = whole(x)
    tiling = _tiling(x_TI, matrix, config, LinearKind.PARTIAL)
    if tiling is None:
        return library_linear(x, matrix)[None]
    size = (tiling.splits, x_TI.shape[0], matrix.shape[0])
    out_STO = x_TI.new_empty(size, dtype=torch.float32)
    launch(x, matrix, out_STO, tiling, LinearKind.PARTIAL, shows_producers=shows_producers)
    return out_STO


def linear_beside(
    x: Rows,
    matrix: QuantisedMatrix,
    beside_BI: torch.Tensor,
    *,
    shows_producers: bool = False,
) -> torch.Tensor | None:
    """As `kernels.linear.linear_beside`, where one kernel computes both; else None."""
    x_TI = whole(x)
    tiling = _tiling(x_TI, matrix, None, LinearKind.PLAIN)
    if tiling is None or not takes_triton(x_TI, beside_BI) or not takes_hopper(x_TI, matrix):
        return None
    if not _takes_beside(x_TI, beside_BI, tiling):
        return None
    out_TO = x_TI.new_empty((x_TI.shape[0], matrix.shape[0] + beside_BI.shape[0]))
    launch(x, matrix, out_TO, tiling, LinearKind.PLAIN, beside_BI=beside_BI, shows_producers=shows_producers)
    return out_TO


def _takes_beside(x_TI: torch.Tensor, beside_BI: torch.Tensor, tiling: Tiling) -> bool:
    """Whether Hopper's kernel of this tiling can compute bf16 rows beside the others."""
    from kiln_nn.kernels.linear.triton_hopper_beside import MOST_TOKENS_BESIDE, takes_beside

    by_rows = isinstance(tiling, RegisterConfig) or (
        isinstance(tiling, LinearConfig) and tiling.x_bits == 16 and x_TI.shape[0] <= MOST_TOKENS_BESIDE
    )
    if not by_rows:
        return takes_beside(x_TI, beside_BI)
    is_plain = beside_BI.dtype is torch.bfloat16 and beside_BI.stride(1) == 1
    return is_plain and x_TI.shape[0] <= MOST_TOKENS_BESIDE


def library_linear(
    x: Rows,
    matrix: QuantisedMatrix,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The library's product, of E4M3 with E4M3 where it has one, else of the weights made whole again."""
    x_TI = whole(x)
    wanted = out_dtype or (x_TI.dtype if out is None else out.dtype)
    if wanted is torch.bfloat16 and multiplies_eight_bits(x_TI, matrix):
        y_TO = _eight_bit_product(round_rows(x), matrix)
        return y_TO if out is None else out.copy_(y_TO)
    return reference.linear(x_TI, matrix.dequantise(x_TI.dtype), out_dtype=out_dtype, out=out)


def reads_as_stored(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether an own kernel multiplies these, so that no whole matrix is made on the way."""
    return _tiling(x_TI, matrix, None, LinearKind.PLAIN) is not None


def reads_rounded(
    x_TI: torch.Tensor, matrix: QuantisedMatrix, *, is_gated: bool = False
) -> InputOrder | None:
    """The order in which the product of such rows with this matrix, in bf16, reads them in E4M3, if it does."""
    tiling = _tiling(x_TI, matrix, None, LinearKind.GATED if is_gated else LinearKind.PLAIN)
    if isinstance(tiling, SpecialisedConfig):
        return "words" if tiling.x_bits == 8 else None
    if tiling is None:
        return "plain" if multiplies_eight_bits(x_TI, matrix) else None
    return "plain" if isinstance(tiling, LinearConfig) and tiling.x_bits == 8 else None


def reads_rounded_groups(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether `linear_partials` of such rows reads them in E4M3 with a scale for each 128 inputs."""
    tiling = _tiling(x_TI, matrix, None, LinearKind.PARTIAL)
    return isinstance(tiling, LinearConfig) and tiling.x_bits == 8 and _takes_groups(tiling)


def _takes_groups(tiling: LinearConfig) -> bool:
    return tiling.promotes and tiling.tokens <= _MOST_TOKENS_WITH_GROUP_SCALES


def multiplies_eight_bits(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether the library multiplies these in E4M3, rows scaled."""
    return (
        matrix.scheme == "fp8"
        and x_TI.dtype is torch.bfloat16
        and x_TI.numel() > 0
        and x_TI.stride(1) == 1
        and takes_triton(x_TI, matrix.values)
        and _has_row_scaled_product(x_TI.device)
        and all(size % 16 == 0 for size in matrix.shape)
        and matrix.values.is_contiguous()
    )


def _eight_bit_product(x: RoundedRows, matrix: QuantisedMatrix) -> torch.Tensor:
    return torch._scaled_mm(
        x.numbers_TI,
        matrix.values.t(),
        scale_a=x.scales_GT.view(-1, 1),
        scale_b=matrix.scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@cache
def _has_row_scaled_product(device: torch.device) -> bool:
    """Torch builds its row-scaled product for Hopper and newer data centre GPUs."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tiling(
    x_TI: torch.Tensor, matrix: QuantisedMatrix, config: Tiling | None, kind: LinearKind
) -> Tiling | None:
    """The kernel's configuration, or None where the library computes this product."""
    if not takes_triton(x_TI, matrix.values, matrix.scales):
        return None
    from kiln_nn.kernels.linear import triton_quantised

    if not triton_quantised.takes(x_TI, matrix):
        return None
    if config is not None:
        return config
    return choose(matrix.scheme, x_TI.shape[0], *matrix.shape, kind, is_hopper=takes_hopper(x_TI, matrix))


def takes_hopper(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether Hopper's kernel computes these; tensors at odd addresses go to the plain kernel."""
    from kiln_nn.kernels.linear.streaming import has_hopper_kernel

    if not has_hopper_kernel(x_TI.device):
        return False
    from kiln_nn.kernels.linear import triton_hopper_quantised

    return triton_hopper_quantised.takes(x_TI, matrix)


def ring_limit(matrix: QuantisedMatrix, shared_memory_bytes: int) -> int:
    """What a program's ring may take of the memory that it shares."""
    if matrix.scheme == "int4":
        scales_bytes = _MOST_GROUP_SCALES * matrix.scales.element_size()
    else:  # of x's groups, float32
        scales_bytes = 4 * _MOST_GROUPS * _MOST_TOKENS_WITH_GROUP_SCALES
    return shared_memory_bytes - scales_bytes - _BARRIERS_BYTES


def launch(
    x: Rows,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: Tiling,
    kind: LinearKind,
    *,
    beside_BI: torch.Tensor | None = None,
    shows_producers: bool = False,
) -> None:
    """Fill `out` by the own kernel of this device; only partial sums use the configuration's splits.

    Hopper's kernels also take rows `beside_BI`; they alone take a `SpecialisedConfig` or a `RegisterConfig`.

    Raises:
        ValueError: the configuration's tiles have too many rows of weights, or do not fit this GPU.
    """
    x_TI = whole(x)
    options: dict[str, Any] = {"is_gated": kind is LinearKind.GATED, "shows_producers": shows_producers}
    if kind is not LinearKind.PARTIAL:
        config = replace(config, splits=1)
    if not isinstance(config, LinearConfig):
        check_rows(config, kind)
    if isinstance(config, RegisterConfig):
        from kiln_nn.kernels.linear import triton_hopper_registers

        triton_hopper_registers.launch(x_TI, matrix, out, config, beside_BI=beside_BI, **options)
        return
    shared_memory_bytes = device_limits(x_TI.device).shared_memory_bytes
    if isinstance(config, SpecialisedConfig):
        from kiln_nn.kernels.linear import triton_hopper_specialised

        fitting = config.fit(matrix.shape[1], matrix.scales.element_size(), shared_memory_bytes)
        triton_hopper_specialised.launch(x, matrix, out, fitting, beside_BI=beside_BI, **options)
        return
    limit = ring_limit(matrix, shared_memory_bytes)
    tiling = fit(config, kind, limit, WEIGHT_BITS[matrix.scheme])
    if not takes_hopper(x_TI, matrix):
        from kiln_nn.kernels.linear import triton_quantised

        triton_quantised.launch(x_TI, matrix, out, tiling, **options)
    elif tiling.x_bits == 8:
        from kiln_nn.kernels.linear import triton_hopper_rounded

        # Splits of the inputs see no whole row either.
        rows = round_groups(x) if kind is LinearKind.PARTIAL and _takes_groups(tiling) else round_rows(x)
        triton_hopper_rounded.launch(rows, matrix, out, tiling, beside_BI=beside_BI, **options)
    else:
        from kiln_nn.kernels.linear import triton_hopper_quantised

        triton_hopper_quantised.launch(x_TI, matrix, out, tiling, beside_BI=beside_BI, **options)
