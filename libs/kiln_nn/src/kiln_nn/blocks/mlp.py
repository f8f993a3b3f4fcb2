"""The gated feed-forward part of a layer."""

from __future__ import annotations

import torch

from kiln_nn.blocks.linear import LinearFn
from kiln_nn.kernels.swiglu import swiglu


def mlp(prefix: str, x_TD: torch.Tensor, linear: LinearFn) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`, `[T, hidden]` to `[T, hidden]`."""
    path = f"{prefix}.mlp"
    gate, up = linear((f"{path}.gate_proj", f"{path}.up_proj"), x_TD)
    (out,) = linear((f"{path}.down_proj",), swiglu(gate, up))
    return out
