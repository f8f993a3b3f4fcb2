"""Shape checks and number formats that every kernel shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from kiln_nn.errors import KilnNnError


class ShapeMismatch(KilnNnError):
    """Tensors handed to a kernel do not fit each other; the message names the first that does not."""

    code = "shape_mismatch"
    hint = "This is a fault in the calling code or a checkpoint that does not match its config.json."

    def __init__(self, name: str, shape: Sequence[object], expected: Sequence[object]) -> None:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        super().__init__(f"{name} has shape {list(shape)}, expected [{wanted}]")


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The format sums are kept in: float32, or float64 if any tensor is float64."""
    has_float64 = any(tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if has_float64 else torch.float32


class HasShape(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shape(name: str, tensor: HasShape, expected: Sequence[int | None]) -> None:
    """Compare a tensor's shape with `expected`, where None accepts any size.

    Raises:
        ShapeMismatch: the number of dimensions or one of the sizes differs.
    """
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        want is not None and have != want for have, want in zip(shape, expected, strict=True)
    ):
        raise ShapeMismatch(name, tuple(shape), tuple(expected))


def check_cu_seqlens(cu_seqlens: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Return document boundaries as a tuple after checking that they cover all tokens.

    Raises:
        ShapeMismatch: the boundaries do not rise from 0 to `num_tokens`.
    """
    bounds = tuple(cu_seqlens)
    rising = all(a <= b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or not rising:
        raise ShapeMismatch("cu_seqlens", bounds, (0, "...", num_tokens))
    return bounds
