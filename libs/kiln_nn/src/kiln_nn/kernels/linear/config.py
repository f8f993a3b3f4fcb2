"""Which tiles a linear layer runs with, by tokens, outputs and inputs: a measured table, then a rule.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class LinearKind(Enum):
    """What becomes of the products: stored, gated in pairs, or left as partial sums."""

    PLAIN = "plain"
    GATED = "gated"
    PARTIAL = "partial"


@dataclass(frozen=True)
class LinearConfig:
    """One tiling of `x Wᵀ`; the sums of every element depend on nothing else.

    `tokens`, `outputs`, `inputs`: a program's tile. `splits`: programs that share the inputs of
    one tile, each with a partial sum of its own. `prefetch`: inputs of each weight row asked for
    before the program waits for its predecessor.
    """

    tokens: int
    outputs: int
    inputs: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    prefetch: int = 512

    def shared_memory_bytes(self, kind: LinearKind) -> int:
        """What the ring of asynchronous copies takes."""
        weight_rows = self.outputs * (2 if kind is LinearKind.GATED else 1)
        return 2 * self.stages * self.inputs * (weight_rows + self.tokens)


MOST_TOKENS = 64  # beyond, the library's matrix product is faster
_NARROW_OUTPUTS = 8192  # fewer outputs do not fill a large GPU without sharing their inputs
_PROGRAMS_WANTED = 256


def choose(num_tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind) -> LinearConfig | None:
    """The configuration for these sizes, or None where the library's product is faster.

    `num_outputs` counts the weight's rows, also for the gated form.
    """
    if num_tokens > MOST_TOKENS:
        return None
    tokens = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    return _rule(tokens, num_outputs, num_inputs, kind)


def invariant_config(num_outputs: int, num_inputs: int) -> LinearConfig:
    """The one configuration that serves every number of tokens, for results that do not depend on it."""
    return _rule(64, num_outputs, num_inputs, LinearKind.PARTIAL)


def fit(config: LinearConfig, kind: LinearKind, shared_memory_bytes: int) -> LinearConfig:
    """The configuration with as many stages as a program's shared memory holds, two at least."""
    while config.stages > 2 and config.shared_memory_bytes(kind) > shared_memory_bytes:
        config = replace(config, stages=config.stages - 1)
    return config


def _rule(tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind) -> LinearConfig:
    is_gated = kind is LinearKind.GATED
    outputs = 32 if is_gated and tokens < 64 else 64
    splits = 1
    if kind is LinearKind.PARTIAL and num_outputs < _NARROW_OUTPUTS:
        programs = -(-num_outputs // outputs)
        while splits < 8 and programs * splits * 2 <= _PROGRAMS_WANTED and num_inputs >= splits * 2 * 256:
            splits *= 2
    return LinearConfig(tokens, outputs, 128, splits=splits, warps=4, stages=4)
