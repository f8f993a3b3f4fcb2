"""What surrounds the mixers: embedding, norms and the head's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.blocks.linear import Weights
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.rms_norm import add_rms_norm, rms_norm
from kiln_nn.weights.names import EMBEDDING, HEAD


def embed(weights: Weights, token_ids_T: torch.Tensor) -> torch.Tensor:
    """Embedding rows of the tokens, `[T, hidden]`."""
    return F.embedding(token_ids_T, weights[EMBEDDING])


def head_weight(config: ModelConfig, weights: Weights) -> torch.Tensor:
    """The `[vocabulary, hidden]` matrix that makes logits; the embedding itself where tied."""
    return weights[EMBEDDING if config.tie_word_embeddings else HEAD]


def decoder_norm(config: ModelConfig, weights: Weights, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    """One of the norms that are stored as the difference from one, by its module path."""
    return rms_norm(x_TD, weights[name + ".weight"], config.rms_norm_eps, offset=1.0)


def mlp_norm(
    config: ModelConfig, weights: Weights, prefix: str, x_TD: torch.Tensor, residual_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the mixer's output to the residual stream; the sum normed for the MLP, and the sum."""
    weight = weights[f"{prefix}.post_attention_layernorm.weight"]
    return add_rms_norm(x_TD, residual_TD, weight, config.rms_norm_eps, offset=1.0)


def input_norm(config: ModelConfig, weights: Weights, prefix: str, x_TD: torch.Tensor) -> torch.Tensor:
    """The norm in front of a layer's attention or DeltaNet."""
    return decoder_norm(config, weights, f"{prefix}.input_layernorm", x_TD)
