"""LoRA dropout whose masks are a function of where they are used.

A mask is drawn again wherever it is needed, in the backward pass and where a layer is computed again, so
that none is kept and a resumed job draws those it would have drawn.

Papers: Srivastava et al. 2014, Dropout; Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch


class LoraDropout:
    """Leaves inputs of the adapter out, not of the base model: each with probability `rate`, below 1.

    Layers that read one input share its mask. Without gradients nothing is left out.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self._key = ""

    def begin(self, key: str) -> None:
        """Draw other masks from here on: those of `key`, such as a seed, a step and a micro-batch."""
        self._key = key

    def factors_of(self, module_paths: Sequence[str], x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """What makes the factors of `x` for these layers: 0, or 1 / (1 - rate). None: leave it as it is."""
        if not self.rate or not torch.is_grad_enabled():
            return None
        digest = hashlib.sha256(f"{self._key}:{module_paths[0]}".encode()).digest()
        seed, kept = int.from_bytes(digest[:8], "big"), 1.0 - self.rate
        shape, dtype, device = x.shape, x.dtype, x.device

        def draw() -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            factors = torch.empty(shape, dtype=dtype, device=device)
            return factors.bernoulli_(kept, generator=generator).div_(kept)

        return draw
