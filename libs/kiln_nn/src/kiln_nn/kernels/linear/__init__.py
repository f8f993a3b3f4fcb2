"""Linear layers: own kernels while few tokens share the reading of the weights, the library beyond.

Weights are bf16 matrices or quantised ones, which are read as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.linear import choice, choice_quantised, quantised, reference
from kiln_nn.kernels.linear.choice import choose
from kiln_nn.kernels.linear.config import LinearConfig, LinearKind, RegisterConfig, SpecialisedConfig, Tiling
from kiln_nn.kernels.linear.quantised import reads_as_stored
from kiln_nn.kernels.quantised import InputOrder, QuantisedMatrix, Rows, Scheme, whole

__all__ = [
    "LinearConfig",
    "RegisterConfig",
    "SpecialisedConfig",
    "Weight",
    "invariant_config",
    "invariant_config_of",
    "linear",
    "linear_beside",
    "linear_partials",
    "linear_swiglu",
    "reads_as_stored",
    "reads_rounded",
]

Weight = torch.Tensor | QuantisedMatrix
"""A matrix `[O, I]`."""


def invariant_config(num_outputs: int, num_inputs: int, scheme: Scheme | None = None) -> LinearConfig:
    """The configuration of a weight (of a quantised one by its scheme) that serves every number of tokens."""
    if scheme is not None:
        return choice_quantised.invariant_config(scheme, num_outputs, num_inputs)
    return choice.invariant_config(num_outputs, num_inputs)


def invariant_config_of(w_OI: Weight) -> LinearConfig:
    """The same for a weight at hand."""
    num_outputs, num_inputs = w_OI.shape
    return invariant_config(
        num_outputs, num_inputs, w_OI.scheme if isinstance(w_OI, QuantisedMatrix) else None
    )


def linear(
    x: Rows,
    w_OI: Weight,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: Tiling | None = None,
    shows_producers: bool = False,
) -> torch.Tensor:
    """`x Wᵀ` in `out_dtype` (by default that of `x`), in `out` if it is given (of that format).

    The rows of `x` and of `out` may lie apart (a slice of a wider tensor). `config` fixes the tiling whatever
    `T` is: with `invariant_config` a row's result has the same bits in every batch. The weights
    may be read before the kernel launched just before has ended, so it must not write them. With
    `shows_producers` the kernel launched next may read what came before this one without waiting.

    Returns: `[T, O]`.

    Raises:
        ShapeMismatch: the inputs of `x` and `w` differ, or `out` has another shape than the result.
    """
    x_TI = whole(x)
    check_shape("x", x_TI, (None, w_OI.shape[-1]))
    if out is not None:
        check_shape("out", out, (x_TI.shape[0], w_OI.shape[0]))
    if isinstance(w_OI, QuantisedMatrix):
        return quantised.linear(
            x, w_OI, out_dtype=out_dtype, out=out, config=config, shows_producers=shows_producers
        )
    tiling = _tiling(x_TI, w_OI, config, LinearKind.PLAIN)
    if tiling is None:
        return reference.linear(x_TI, w_OI, out_dtype=out_dtype, out=out)
    from kiln_nn.kernels.linear import streaming

    return streaming.linear(x_TI, w_OI, tiling, out_dtype=out_dtype, out=out, shows_producers=shows_producers)


def linear_beside(
    x: Rows, parts: Sequence[Weight], *, is_invariant: bool = False, shows_producers: bool = False
) -> torch.Tensor:
    """`x Wᵀ` of several weights in one tensor, side by side; see `linear`.

    A few bf16 rows after a quantised matrix cost nothing with few tokens, unless tilings are to be
    those of every number of tokens (`is_invariant`).

    Returns: `[T, O]`, the sum of the parts' outputs.

    Raises:
        ShapeMismatch: the inputs of `x` and of a part differ.
    """
    x_TI = whole(x)
    for part in parts:
        check_shape("x", x_TI, (None, part.shape[-1]))
    if len(parts) == 2 and not is_invariant:
        matrix, beside_BI = parts
        if isinstance(matrix, QuantisedMatrix) and isinstance(beside_BI, torch.Tensor):
            y_TO = quantised.linear_beside(x, matrix, beside_BI, shows_producers=shows_producers)
            if y_TO is not None:
                return y_TO
    widths = [part.shape[0] for part in parts]
    y_TO = x_TI.new_empty((x_TI.shape[0], sum(widths)))
    for part, out in zip(parts, y_TO.split(widths, dim=1), strict=True):
        config = invariant_config_of(part) if is_invariant else None
        linear(x, part, out=out, config=config, shows_producers=shows_producers)
    return y_TO


def linear_swiglu(x: Rows, gate_up_OI: Weight, *, config: Tiling | None = None) -> torch.Tensor:
    """`silu(x Wgᵀ) · (x Wuᵀ)` where the first half of the weight's rows is Wg; see `linear`.

    Returns: `[T, O / 2]` in the format of `x`.

    Raises:
        ShapeMismatch: the inputs of `x` and the weight differ, or its rows are not two halves.
    """
    x_TI = whole(x)
    num_outputs, num_inputs = gate_up_OI.shape
    check_shape("x", x_TI, (None, num_inputs))
    check_shape("gate_up", gate_up_OI, (num_outputs // 2 * 2, num_inputs))
    if isinstance(gate_up_OI, QuantisedMatrix):
        return quantised.linear_swiglu(x, gate_up_OI, config=config)
    tiling = _tiling(x_TI, gate_up_OI, config, LinearKind.GATED)
    if tiling is None:
        return reference.linear_swiglu(x_TI, gate_up_OI)
    from kiln_nn.kernels.linear import streaming

    return streaming.linear_swiglu(x_TI, gate_up_OI, tiling)


def linear_partials(
    x: Rows,
    w_OI: Weight,
    *,
    config: Tiling | None = None,
    shows_producers: bool = False,
    is_apart: bool = False,
) -> torch.Tensor:
    """`x Wᵀ` as partial sums for `add_rms_norm`, which adds them up in their order; see `linear`.

    With many tokens a kernel adds them up itself, unless they are to stay apart: what is added to
    the first of them on the way is then rounded alike for any number of tokens.

    Returns: `[S, T, O]` in float32; where the library computes it, `[1, T, O]` in the format of `x`.

    Raises:
        ShapeMismatch: the inputs of `x` and `w` differ.
    """
    x_TI = whole(x)
    check_shape("x", x_TI, (None, w_OI.shape[-1]))
    if isinstance(w_OI, QuantisedMatrix):
        return quantised.linear_partials(x, w_OI, config=config, shows_producers=shows_producers)
    tiling = _tiling(x_TI, w_OI, config, LinearKind.PARTIAL)
    if tiling is None:
        return reference.linear_partials(x_TI, w_OI)
    from kiln_nn.kernels.linear import streaming

    options = {"shows_producers": shows_producers, "is_apart": is_apart}
    return streaming.linear_partials(x_TI, w_OI, tiling, **options)


def reads_rounded(
    x_TI: torch.Tensor, parts: Sequence[Weight], *, is_gated: bool = False
) -> InputOrder | None:
    """In which order `linear` and `linear_beside`, or `linear_swiglu`, read such rows in E4M3 for one of these.

    Then whoever makes the rows may as well round them (`add_rms_norm_rounded`): `x_TI` has their number,
    width and format. None where all read them whole.
    """
    matrices = [part for part in parts if isinstance(part, QuantisedMatrix)]
    orders = (quantised.reads_rounded(x_TI, matrix, is_gated=is_gated) for matrix in matrices)
    return next((order for order in orders if order is not None), None)


def reads_rounded_groups(x_TI: torch.Tensor, w_OI: Weight) -> bool:
    """Whether `linear_partials` reads such rows in E4M3 with a scale for each 128 inputs.

    Then whoever makes the rows, 128 outputs or more at a time, may as well round them: nobody has to see a whole
    row for that. `x_TI` has their number, width and format.
    """
    return isinstance(w_OI, QuantisedMatrix) and quantised.reads_rounded_groups(x_TI, w_OI)


def _tiling(
    x_TI: torch.Tensor, w_OI: torch.Tensor, config: Tiling | None, kind: LinearKind
) -> LinearConfig | None:
    """The kernel's configuration, or None where the library computes this product."""
    if not takes_triton(x_TI, w_OI):
        return None
    from kiln_nn.kernels.linear import streaming, triton

    if not triton.takes(x_TI, w_OI):
        return None
    if config is not None:
        assert isinstance(config, LinearConfig), "the other is for quantised weights"
        return config
    num_outputs, num_inputs = w_OI.shape
    is_hopper = streaming.takes_hopper(x_TI, w_OI)
    return choose(x_TI.shape[0], num_outputs, num_inputs, kind, is_hopper=is_hopper)
