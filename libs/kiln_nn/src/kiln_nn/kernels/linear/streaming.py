"""The own kernels of a linear layer: Hopper's where the device and the tensors allow, else the plain one.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from functools import cache

import torch

from kiln_nn.kernels.dispatch import device_limits, is_interpreted
from kiln_nn.kernels.linear import triton
from kiln_nn.kernels.linear.config import LinearConfig, LinearKind, fit

_MOST_TOKENS_APART = 128  # beyond, partial sums cost more traffic than they spread work


@cache
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether Gluon's kernels run: for one compute capability, in a part of Triton that may still move."""
    if device.type != "cuda" or is_interpreted() or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from kiln_nn.kernels.linear import triton_hopper  # noqa: F401
    except ImportError:
        return False
    return True


def takes_hopper(x_TI: torch.Tensor, w_OI: torch.Tensor) -> bool:
    """Whether Hopper's kernel computes these; tensors at odd addresses go to the plain kernel."""
    if not has_hopper_kernel(x_TI.device):
        return False
    from kiln_nn.kernels.linear import triton_hopper

    return triton_hopper.takes(x_TI, w_OI)


def linear(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    config: LinearConfig,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    shows_producers: bool = False,
) -> torch.Tensor:
    """As the reference; partial sums, if the configuration has any, are added up in the kernel."""
    out_TO = out
    if out_TO is None:
        out_TO = x_TI.new_empty((x_TI.shape[0], w_OI.shape[0]), dtype=out_dtype or x_TI.dtype)
    _launch(x_TI, w_OI, out_TO, config, LinearKind.PLAIN, is_folded=True, shows_producers=shows_producers)
    return out_TO


def linear_swiglu(x_TI: torch.Tensor, gate_up_OI: torch.Tensor, config: LinearConfig) -> torch.Tensor:
    """As the reference; the configuration's splits are not used."""
    out_TF = x_TI.new_empty((x_TI.shape[0], gate_up_OI.shape[0] // 2))
    _launch(x_TI, gate_up_OI, out_TF, config, LinearKind.GATED)
    return out_TF


def linear_partials(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    config: LinearConfig,
    *,
    shows_producers: bool = False,
    is_apart: bool = False,
) -> torch.Tensor:
    """Partial sums `[S, T, O]` in float32.

    With many tokens, unless sums stay apart, one program computes all sums of a tile and adds them
    up itself: to the bit what the norm makes of the others.
    """
    is_folded = not is_apart and x_TI.shape[0] > _MOST_TOKENS_APART
    splits = 1 if is_folded else config.splits
    out_STO = x_TI.new_empty((splits, x_TI.shape[0], w_OI.shape[0]), dtype=torch.float32)
    _launch(
        x_TI,
        w_OI,
        out_STO,
        config,
        LinearKind.PARTIAL,
        is_folded=is_folded,
        shows_producers=shows_producers,
    )
    return out_STO


def _launch(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    out: torch.Tensor,
    config: LinearConfig,
    kind: LinearKind,
    *,
    is_folded: bool = False,
    shows_producers: bool = False,
) -> None:
    is_gated = kind is LinearKind.GATED
    tiling = fit(config, kind, device_limits(x_TI.device).shared_memory_bytes)
    options = {"is_gated": is_gated, "is_folded": is_folded, "shows_producers": shows_producers}
    if takes_hopper(x_TI, w_OI):
        from kiln_nn.kernels.linear import triton_hopper

        triton_hopper.launch(x_TI, w_OI, out, tiling, **options)
    else:
        triton.launch(x_TI, w_OI, out, tiling, **options)
