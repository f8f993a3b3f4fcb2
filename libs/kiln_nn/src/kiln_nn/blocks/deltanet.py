"""The DeltaNet layer around its convolution and its recurrence.

Its order is: `project_deltanet`, the causal convolution over `mixed_TC` (with
`conv_weight`) and its cut into heads, `delta_gates`, the gated delta rule, `finish_deltanet`. The
two steps between that remember something are the caller's: packed, paged or one token.

Legend: `T` tokens, `C` convolution channels (q|k|v side by side), `H` value heads, `V` their width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kiln_nn.blocks.linear import LinearFn, Weights
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.gated_delta import delta_rule_gates
from kiln_nn.kernels.rms_norm import gated_rms_norm


class DeltaProjection(NamedTuple):
    """What the layer's input is projected to.

    `mixed_TC` are the rows q|k|v before the convolution: the ring and the checkpoints keep
    them, because the convolution's window belongs to the state.
    """

    mixed_TC: torch.Tensor
    z_THV: torch.Tensor
    b_TH: torch.Tensor
    a_TH: torch.Tensor


def project_deltanet(
    config: ModelConfig, prefix: str, x_TD: torch.Tensor, linear: LinearFn
) -> DeltaProjection:
    """Project the layer's input (after `input_norm`)."""
    path = f"{prefix}.linear_attn"
    names = tuple(f"{path}.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
    mixed, z, b, a = linear(names, x_TD)
    return DeltaProjection(
        mixed_TC=mixed,
        z_THV=z.view(-1, config.linear_num_value_heads, config.linear_value_head_dim),
        b_TH=b,
        a_TH=a,
    )


def conv_weight(weights: Weights, prefix: str) -> torch.Tensor:
    """The depthwise kernel as `[C, width]`."""
    return weights[f"{prefix}.linear_attn.conv1d.weight"].squeeze(1)


def delta_gates(
    weights: Weights, prefix: str, a_TH: torch.Tensor, b_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decay `g = -exp(A_log) softplus(a + dt_bias)` and write strength `beta = sigmoid(b)`.

    Returns: g and beta, each `[T, H]` in float32.
    """
    path = f"{prefix}.linear_attn"
    return delta_rule_gates(a_TH, b_TH, weights[f"{path}.A_log"], weights[f"{path}.dt_bias"])


def finish_deltanet(
    config: ModelConfig,
    weights: Weights,
    prefix: str,
    out_THV: torch.Tensor,
    z_THV: torch.Tensor,
    linear: LinearFn,
) -> torch.Tensor:
    """Norm and gate the recurrence's output and project it back, `[T, hidden]`."""
    path = f"{prefix}.linear_attn"
    normed = gated_rms_norm(out_THV, z_THV, weights[f"{path}.norm.weight"], config.rms_norm_eps)
    (out,) = linear((f"{path}.out_proj",), normed.flatten(1))
    return out
