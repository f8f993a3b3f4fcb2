"""The arithmetic of one layer, shared by the packed (training) and the paged (serving) model.

Blocks are functions of the checkpoint's tensors and one layer's prefix, such as
`model.layers.3`. They keep nothing: what a sequence remembers (KV pages, states, rings)
belongs to the caller, who computes the mixing step between `project_*` and `finish_*`.
"""

from kiln_nn.blocks.attention import AttentionInputs, finish_attention, project_attention
from kiln_nn.blocks.deltanet import (
    DeltaProjection,
    conv_weight,
    delta_gates,
    finish_deltanet,
    project_deltanet,
)
from kiln_nn.blocks.layer import decoder_norm, embed, head_weight, input_norm, mlp_norm
from kiln_nn.blocks.linear import LinearFn, Weights, base_linear
from kiln_nn.blocks.mlp import mlp

__all__ = [
    "AttentionInputs",
    "DeltaProjection",
    "LinearFn",
    "Weights",
    "base_linear",
    "conv_weight",
    "decoder_norm",
    "delta_gates",
    "embed",
    "finish_attention",
    "finish_deltanet",
    "head_weight",
    "input_norm",
    "mlp",
    "mlp_norm",
    "project_attention",
    "project_deltanet",
]
