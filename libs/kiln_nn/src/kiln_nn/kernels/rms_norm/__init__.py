"""Root-mean-square norms: the layer norm, with its residual addition, and the DeltaNet's gated norm."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu, needs_gradients, takes_triton
from kiln_nn.kernels.quantised import InputOrder, RoundedRows, round_rows
from kiln_nn.kernels.rms_norm import reference
from kiln_nn.kernels.rms_norm.reference import l2_normalise

__all__ = [
    "add_rms_norm",
    "add_rms_norm_rounded",
    "gated_rms_norm",
    "l2_normalise",
    "rms_norm",
    "rms_norm_rounded",
]


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float) -> torch.Tensor:
    """Normalise the last dimension and multiply by `offset + weight`.

    Qwen3.5 stores its layer, query, key and final norms as the difference from
    one, so they pass `offset=1`.

    Returns: the shape and format of `x_D`.
    """
    check_shape("weight", weight_D, (x_D.shape[-1],))
    if takes_triton(x_D, weight_D):
        from kiln_nn.kernels.rms_norm import triton

        if triton.takes(weight_D, x_D):
            return triton.rms_norm(x_D, weight_D, eps, offset=offset)
    elif _may_train(weight_D, x_D):
        from kiln_nn.kernels.rms_norm import training

        return training.rms_norm(x_D, weight_D, eps, offset=offset)
    return reference.rms_norm(x_D, weight_D, eps, offset=offset)


def add_rms_norm(
    x_D: torch.Tensor, residual_D: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual stream and normalise the sum as `rms_norm` does.

    `x_D` may have one more dimension in front: partial sums (`linear_partials`), added in their
    order in float32.

    Returns: the normed sum and the sum itself, both in the format of `residual_D`.
    """
    partials = (None,) if x_D.dim() > residual_D.dim() else ()
    check_shape("x", x_D, (*partials, *residual_D.shape))
    check_shape("weight", weight_D, (x_D.shape[-1],))
    if takes_triton(x_D, residual_D, weight_D):
        from kiln_nn.kernels.rms_norm import triton

        if triton.takes(weight_D, x_D, residual_D):
            return triton.add_rms_norm(x_D, residual_D, weight_D, eps, offset=offset)
    elif not partials and x_D.dtype is residual_D.dtype and _may_train(weight_D, x_D, residual_D):
        from kiln_nn.kernels.rms_norm import training

        return training.add_rms_norm(x_D, residual_D, weight_D, eps, offset=offset)
    return reference.add_rms_norm(x_D, residual_D, weight_D, eps, offset=offset)


def rms_norm_rounded(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, offset: float, order: InputOrder = "plain"
) -> RoundedRows:
    """`rms_norm` of rows `[T, D]`, which are rounded to E4M3 as well: as `round_rows` does, to the bit."""
    check_shape("x", x_TD, (None, None))
    check_shape("weight", weight_D, (x_TD.shape[-1],))
    if takes_triton(x_TD, weight_D):
        from kiln_nn.kernels.rms_norm import triton

        if triton.takes(weight_D, x_TD):
            return triton.rms_norm_rounded(x_TD, weight_D, eps, offset=offset, order=order)
    return round_rows(reference.rms_norm(x_TD, weight_D, eps, offset=offset), order)


def add_rms_norm_rounded(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    offset: float,
    order: InputOrder = "plain",
) -> tuple[RoundedRows, torch.Tensor]:
    """`add_rms_norm` of rows `[T, D]`, partial sums too, which are rounded as `rms_norm_rounded` does."""
    check_shape("residual", residual_TD, (None, None))
    partials = (None,) if x_TD.dim() > residual_TD.dim() else ()
    check_shape("x", x_TD, (*partials, *residual_TD.shape))
    check_shape("weight", weight_D, (x_TD.shape[-1],))
    if takes_triton(x_TD, residual_TD, weight_D):
        from kiln_nn.kernels.rms_norm import triton

        if triton.takes(weight_D, x_TD, residual_TD):
            return triton.add_rms_norm_rounded(x_TD, residual_TD, weight_D, eps, offset=offset, order=order)
    normed_TD, total_TD = reference.add_rms_norm(x_TD, residual_TD, weight_D, eps, offset=offset)
    return round_rows(normed_TD, order), total_TD


def gated_rms_norm(x_D: torch.Tensor, z_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x`, multiply by `weight`, then gate with `silu(z)`: the norm comes first.

    Returns: the shape of `x_D` in the format of `z_D` (the DeltaNet's output is
    kept in float32 until here).
    """
    check_shape("weight", weight_D, (x_D.shape[-1],))
    if takes_triton(x_D, z_D, weight_D) and x_D.shape == z_D.shape:
        from kiln_nn.kernels.rms_norm import triton

        if triton.takes(weight_D, x_D, z_D):
            return triton.gated_rms_norm(x_D, z_D, weight_D, eps)
    elif x_D.shape == z_D.shape and _may_train(weight_D, x_D, z_D):
        from kiln_nn.kernels.rms_norm import training

        return training.gated_rms_norm(x_D, z_D, weight_D, eps)
    return reference.gated_rms_norm(x_D, z_D, weight_D, eps)


def _may_train(weight_D: torch.Tensor, *inputs_D: torch.Tensor) -> bool:
    """Whether the kernels give these inputs their gradients; they have none for the weight."""
    if (
        weight_D.requires_grad
        or not needs_gradients(*inputs_D)
        or not may_train_on_gpu("rms_norm", weight_D, *inputs_D)
    ):
        return False
    from kiln_nn.kernels.rms_norm import triton

    return triton.takes(weight_D, *inputs_D)
