"""The gated feed-forward part of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.blocks.linear import LinearFn


def mlp(prefix: str, x_TD: torch.Tensor, linear: LinearFn) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`, `[T, hidden]` to `[T, hidden]`."""
    gate = F.silu(linear(f"{prefix}.mlp.gate_proj", x_TD))
    return linear(f"{prefix}.mlp.down_proj", gate * linear(f"{prefix}.mlp.up_proj", x_TD))
