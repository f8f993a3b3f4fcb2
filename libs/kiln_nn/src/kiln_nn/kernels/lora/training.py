"""Linear layers of a frozen base with the adapter that learns on top: products and their gradients.

For layers that read one input the adapters' first products are one product. With `h = x (s A)^T`:

    y = x W^T + h B^T                dx = dy W + dh (s A),  dh = dy B
    dA = s dh^T x                    dB = dy^T h

The updates come first and the base's product is added to them where they lie: its sum is in float32 and
is rounded once, and reading what lies there costs a product of that size nothing. Products take the
base's format; the gradients of A and B are summed in float32 and stay there. The base gets none, so
nothing of its size is ever made, but one matrix at a time where it is quantised.

With dropout `x` is multiplied by factors where the adapter reads it, and so is its gradient on that way.
The factors are made again wherever they are needed.

Legend: `T` tokens, `I` inputs, `O` outputs of a layer, `r` rank, `Q` ranks of all adapted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kiln_nn.kernels.quantised import QuantisedMatrix, dense

Factors = Callable[[], torch.Tensor] | None
"""Makes the factors `[T, I]` of dropout, the same each time; None where there is none."""


@dataclass(frozen=True)
class AdapterCopies:
    """What products read of the adapter of layers that share an input, in the base's format.

    `ranks`: for every layer its columns in Q, None where it has no adapter. `b_Or` has those with one.
    """

    scaled_a_QI: torch.Tensor
    b_Or: tuple[torch.Tensor, ...]
    ranks: tuple[slice | None, ...]
    scale: float

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        scale: float,
        dtype: torch.dtype,
    ) -> AdapterCopies:
        """Copies of A `[r, I]` and B `[O, r]` of each layer that has them; at least one does."""
        present = [pair for pair in pairs if pair is not None]
        ranks: list[slice | None] = []
        end = 0
        for pair in pairs:
            start, end = end, end + (0 if pair is None else pair[0].shape[0])
            ranks.append(None if pair is None else slice(start, end))
        scaled = torch.cat([a.detach() * scale for a, _ in present]).to(dtype)
        return cls(scaled, tuple(b.detach().to(dtype) for _, b in present), tuple(ranks), scale)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`left right`, summed and returned in `dtype`."""
    if left.is_cuda and left.dtype is not dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


class _Shrink(torch.autograd.Function):
    """`x` as it is and `h`: the part of the layers that keeps `x` for the backward pass.

    One function cut in two: where a whole block is computed again, autograd stops once everything that
    was kept is there, before `_Expand` and its products if that comes last.
    """

    @staticmethod
    def forward(
        ctx: Any, copies: AdapterCopies, factors: Factors, x: torch.Tensor, *a: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        ctx.copies, ctx.factors, ctx.dtype = copies, factors, a[0].dtype
        return x, F.linear(x if factors is None else x * factors(), copies.scaled_a_QI)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (x_grad, h_grad) = ctx.saved_tensors, grads
        if ctx.factors is not None:
            x = x * ctx.factors()
        a_grad = _product(h_grad.t(), x, ctx.dtype).mul_(ctx.copies.scale)
        a_grads = [a_grad[ranks] for ranks in ctx.copies.ranks if ranks is not None]
        return None, None, x_grad if ctx.needs_input_grad[2] else None, *a_grads


class _Expand(torch.autograd.Function):
    """The outputs from `x` and `h`; the gradient it gives to `x` is the whole one, that through `h` too.

    It keeps `h` itself: narrow, and not counted among what must be there before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        copies: AdapterCopies,
        factors: Factors,
        num_layers: int,
        x: torch.Tensor,
        h: torch.Tensor,
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        weights, b = tensors[:num_layers], iter(copies.b_Or)
        outputs = []
        for weight, ranks in zip(weights, copies.ranks, strict=True):
            w = dense(weight, x.dtype)
            if ranks is None:
                outputs.append(F.linear(x, w))
            else:
                outputs.append(torch.mm(h[:, ranks], next(b).t()).addmm_(x, w.t()))
        ctx.copies, ctx.weights, ctx.h, ctx.dtype = copies, weights, h, tensors[-1].dtype
        ctx.factors = factors
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        copies, h = ctx.copies, ctx.h
        h_grad, b_grads, b = torch.empty_like(h), [], iter(copies.b_Or)
        for grad, ranks in zip(grads, copies.ranks, strict=True):
            if ranks is not None:
                torch.mm(grad, next(b), out=h_grad[:, ranks])
                b_grads.append(_product(grad.t(), h[:, ranks], ctx.dtype))
        x_grad = None
        if ctx.needs_input_grad[3]:
            x_grad = torch.mm(h_grad, copies.scaled_a_QI)
            if ctx.factors is not None:
                x_grad.mul_(ctx.factors())
            for grad, weight in zip(grads, ctx.weights, strict=True):
                x_grad.addmm_(grad, dense(weight, grad.dtype))
        return None, None, None, x_grad, h_grad, *([None] * len(grads)), *b_grads


def adapted_linears(
    x_TI: torch.Tensor,
    weights_OI: Sequence[torch.Tensor | QuantisedMatrix],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    copies: AdapterCopies,
    factors: Factors = None,
) -> tuple[torch.Tensor, ...]:
    """Outputs `[T, O]` of layers that read `x`, with gradients of `x` and of the pairs A, B.

    `copies` are those of `pairs`, in the format of `x` and the weights; `factors` are dropout's.
    """
    present = [pair for pair in pairs if pair is not None]
    same_x, h = _Shrink.apply(copies, factors, x_TI, *(a for a, _ in present))
    # Where x needs no gradient its alias must not ask for one.
    x = same_x if x_TI.requires_grad else x_TI
    tensors = (x, h, *weights_OI, *(b for _, b in present))
    return _Expand.apply(copies, factors, len(weights_OI), *tensors)  # type: ignore[no-any-return]
