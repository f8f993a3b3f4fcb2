"""The seam at which adapters join a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]
"""Checkpoint tensors by canonical name, such as `model.layers.0.mlp.up_proj.weight`."""

LinearFn = Callable[[str, torch.Tensor], torch.Tensor]
"""Applies the linear layer at a module path (`model.layers.0.mlp.up_proj`) to `[T, inputs]`.

The engine's adds each row's own adapter, the trainer's the one it is learning.
"""


def base_linear(weights: Weights) -> LinearFn:
    """Linear layers of the bare base model."""

    def linear(module_path: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[module_path + ".weight"])

    return linear
