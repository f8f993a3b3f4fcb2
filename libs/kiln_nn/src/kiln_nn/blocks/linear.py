"""The seam at which adapters join a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]
"""Checkpoint tensors by canonical name, such as `model.layers.0.mlp.up_proj.weight`."""

LinearFn = Callable[[Sequence[str], torch.Tensor], tuple[torch.Tensor, ...]]
"""Applies the linear layers at some module paths, such as `model.layers.0.mlp.up_proj`, to one input.

`[T, inputs]` to a `[T, outputs]` each. The trainer's adds the adapter it is learning, whose first
products are one for layers that come together.
"""


def base_linear(weights: Weights) -> LinearFn:
    """Linear layers of the bare base model."""

    def linear(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(F.linear(x, weights[path + ".weight"]) for path in module_paths)

    return linear
