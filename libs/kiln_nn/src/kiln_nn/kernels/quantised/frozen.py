"""Linear layers whose weight may be quantised, differentiable in their input.

A quantised weight is made anew where a product needs it, forward and backward, and is kept nowhere.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kiln_nn.kernels.quantised.matrix import QuantisedMatrix


def dense(weight: torch.Tensor | QuantisedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[O, I]` as a tensor: itself, or dequantised into `dtype`."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantise(dtype)


def tensors_of(weight: torch.Tensor | QuantisedMatrix) -> tuple[torch.Tensor, ...]:
    """The tensors a weight consists of."""
    return (weight,) if isinstance(weight, torch.Tensor) else (weight.values, weight.scales)


def frozen_linear(x_TI: torch.Tensor, weight: torch.Tensor | QuantisedMatrix) -> torch.Tensor:
    """`x W^T`, `[T, O]`."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x_TI, weight)
    return _QuantisedLinear.apply(x_TI, weight)  # type: ignore[no-any-return]


class _QuantisedLinear(torch.autograd.Function):
    """Keeps the quantised weight for the backward pass; autograd alone would keep the whole one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantisedMatrix) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.weight.dequantise(grad.dtype), None
