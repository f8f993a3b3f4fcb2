"""The seam at which adapters join a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kiln_nn.kernels.quantised import frozen_linear

Weights = Mapping[str, Any]
"""Checkpoint tensors by canonical name, such as `model.layers.0.mlp.up_proj.weight`.

Linear layers of the decoder may be `QuantisedMatrix`; everything else is a tensor.
"""

LinearFn = Callable[[Sequence[str], torch.Tensor], tuple[torch.Tensor, ...]]
"""Applies the linear layers at some module paths, such as `model.layers.0.mlp.up_proj`, to one input.

`[T, inputs]` to a `[T, outputs]` each. The trainer's adds the adapter it is learning, whose first
products are one for layers that come together.
"""


def base_linear(weights: Weights) -> LinearFn:
    """Linear layers of the bare base model; plain weights that require gradients receive them."""

    def linear(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(frozen_linear(x, weights[path + ".weight"]) for path in module_paths)

    return linear
