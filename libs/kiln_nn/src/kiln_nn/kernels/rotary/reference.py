"""Rotary position embedding in plain torch.

Legend: `T` tokens, `H` heads, `D` head width, `E` rotated width (the first E of D).

Paper: Su et al. 2021, RoFormer (arXiv 2104.09864). Halves are rotated against
each other (component i with component i + E/2), as in the Qwen checkpoints.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.kernels.checks import check_shape


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # training may reuse what serving cached
def _inverse_frequencies(theta: float, rotary_dim: int, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return (1.0 / theta**exponents).to(device)


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Radians per position of each rotated pair, `[E / 2]` in float32."""
    return _inverse_frequencies(config.rope_theta, config.rotary_dim, device)


def cos_and_sin(
    positions_T: torch.Tensor, inverse_frequencies_F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of float32 angles, both `[T, E]`: the pairs' first halves, then the second."""
    angles = positions_T.to(torch.float32)[:, None] * inverse_frequencies_F
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotary_tables(positions_T: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for each position, both `[T, E]` in float32.

    Images would give three positions per token; text gives one, so the
    multi-dimensional form of the checkpoint reduces to this one.
    """
    return cos_and_sin(positions_T, inverse_frequencies(config, positions_T.device))


def apply_rotary(x_THD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotate the first E components of every head; the others pass through.

    Returns: the shape and format of `x_THD`.
    """
    num_tokens, rotary_dim = cos_TE.shape
    check_shape("x", x_THD, (num_tokens, None, None))
    cos, sin = cos_TE[:, None].to(x_THD.dtype), sin_TE[:, None].to(x_THD.dtype)
    turning, passing = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = torch.addcmul(turning * cos, torch.cat((-second, first), dim=-1), sin)
    return torch.cat((turned, passing), dim=-1)
