"""Random inputs of the gated delta rule whose memories last from 1 to 4,096 tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeltaInputs:
    """`[T, key heads, K]` q and k, `[T, value heads, V]` v, `[T, value heads]` g and beta."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(dtype or x.dtype) for x in (self.q, self.k, self.v, self.g, self.beta))

    def part(self, start: int, end: int) -> DeltaInputs:
        return DeltaInputs(*(x[start:end] for x in self.tensors()))


def random_delta_inputs(
    num_tokens: int,
    *,
    num_key_heads: int = 2,
    num_value_heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 12,
    seed: int = 0,
    repeated_keys: bool = False,
) -> DeltaInputs:
    """Draw inputs in float64; head half-lives are log-uniform between 1 and 4,096 tokens.

    With `repeated_keys` all keys nearly coincide, the hard case for the triangular solve.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(2, num_tokens, num_key_heads, key_dim)
    if repeated_keys:
        k = k[:1] + 0.05 * k
    q = q / q.norm(dim=-1, keepdim=True) * key_dim**-0.5
    k = k / k.norm(dim=-1, keepdim=True)
    half_lives = 4096.0 ** torch.rand(num_value_heads, generator=generator, dtype=torch.float64)
    jitter = torch.rand(num_tokens, num_value_heads, generator=generator, dtype=torch.float64) + 0.5
    g = -math.log(2.0) / half_lives * jitter
    beta = torch.sigmoid(normal(num_tokens, num_value_heads))
    return DeltaInputs(q, k, normal(num_tokens, num_value_heads, value_dim), g, beta)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference relative to the size of the expected tensor."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
