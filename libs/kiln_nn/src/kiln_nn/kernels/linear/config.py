"""How a linear layer is tiled.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

MOST_ROWS = 64  # of weights in a tile of those that are not LinearConfig's


class LinearKind(Enum):
    """What becomes of the products: stored, gated in pairs, or left as partial sums."""

    PLAIN = "plain"
    GATED = "gated"
    PARTIAL = "partial"


@dataclass(frozen=True)
class LinearConfig:
    """One tiling of `x Wᵀ`; the sums of every element depend on nothing else.

    `tokens`, `outputs`, `inputs`: a program's tile, in the gated form `outputs` pairs of rows.
    `splits`: programs that share the inputs of one tile, each with a partial sum of its own.
    `stages`: tiles in the ring that the memory fills ahead.
    `x_bits`: 8 where E4M3 weights meet x rounded to E4M3; `promotes`: whether sums over 128 such inputs
    are added up in float32, not in the fewer bits of tensor cores.
    """

    tokens: int
    outputs: int
    inputs: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    x_bits: int = 16
    promotes: bool = True

    def shared_memory_bytes(self, kind: LinearKind, weight_bits: int = 16) -> int:
        """What the ring takes."""
        bits = weight_bits * weight_rows(self.outputs, kind) + self.x_bits * self.tokens
        return self.stages * self.inputs * bits // 8


@dataclass(frozen=True)
class RegisterConfig:
    """One tiling of few tokens whose weights go straight to registers; again sums depend on nothing else.

    `outputs`: a program's, 16, 32 or 64 rows of weights, in the gated form 8, 16 or 32 pairs of them.
    `splits`: programs that share the inputs of the same outputs, each with a partial sum of its own.
    `warps`: of a program, each with as many groups of 128 inputs one after another, rounded up.
    `ahead`: groups whose weights a warp has asked for before it multiplies the first.
    `registers`: of a thread at most, 0 for as many as it likes; with fewer more programs, also of the next
    kernel, lie on a multiprocessor.
    `is_staged`: weights wait in shared memory until they are multiplied, not in registers.
    """

    outputs: int
    splits: int = 1
    warps: int = 4
    ahead: int = 4
    registers: int = 0
    is_staged: bool = False

    def __post_init__(self) -> None:
        assert self.outputs in (8, 16, 32, 64), "tensors are powers of two, and registers hold no more"
        assert self.warps in (4, 8), "a thread adds up one of their sums each"
        assert self.splits > 0
        assert self.ahead > 0


@dataclass(frozen=True)
class SpecialisedConfig:
    """One tiling of four-bit weights for specialised warps; again sums depend on nothing else.

    `tokens`, `outputs`: a tile, 64 rows of weights at most, in the gated form pairs.
    `groups`: warp groups of a program, two or three, that share x.
    `tiles`: of a warp group, one or three below each other.
    `splits`: programs that share the inputs of one tile, each with a partial sum of its own.
    `stages`: slots of 128 inputs in the ring that one more warp fills, `groups` at least.
    `x_bits`: 8 where x is rounded to E4M3, which weights become as well; then tiles are single, of 128
    tokens at most, and stages twice as many as groups.
    """

    tokens: int
    outputs: int
    groups: int = 2
    tiles: int = 1
    splits: int = 1
    stages: int = 4
    x_bits: int = 16

    def __post_init__(self) -> None:
        assert self.groups in (2, 3), self
        assert self.tiles in (1, 3), self
        assert self.stages >= self.fewest_stages, self
        assert self.outputs <= MOST_ROWS, self
        assert self.x_bits == 16 or (self.tiles == 1 and self.tokens <= 128), self

    @property
    def fewest_stages(self) -> int:
        """Each group leaves its sums where x has been, 64 rows of 4 bytes a token."""
        return self.groups * 16 // self.x_bits

    @property
    def ring_bytes(self) -> int:
        """What the slots take, each of 64 bytes a row of weights and 128 inputs of every token."""
        return self.stages * (self.groups * self.tiles * 64 * 64 + 16 * self.x_bits * self.tokens)

    def shared_memory_bytes(self, num_inputs: int, scale_bytes: int = 2) -> int:
        """What a program takes: the ring, the scales of all its groups of inputs, and barriers."""
        num_scales = max(16, 1 << (-(-(num_inputs // 128) // self.splits) - 1).bit_length())
        scales = scale_bytes * num_scales * self.groups * self.tiles * 64
        token_scales = 4 * self.groups * self.tokens if self.x_bits == 8 else 0
        return self.ring_bytes + scales + token_scales + 1024

    def fit(self, num_inputs: int, scale_bytes: int, limit: int) -> SpecialisedConfig:
        """The same with as many stages as a program's shared memory holds.

        Raises:
            ValueError: not even the fewest stages fit.
        """
        config = self
        while config.shared_memory_bytes(num_inputs, scale_bytes) > limit:
            if config.stages == config.fewest_stages:
                wanted = config.shared_memory_bytes(num_inputs, scale_bytes)
                raise ValueError(
                    f"{config} wants {wanted} bytes of shared memory for {num_inputs} inputs, a program has "
                    f"{limit}: more splits, or fewer tokens or groups"
                )
            config = replace(config, stages=config.stages - 1)
        return config


Tiling = LinearConfig | RegisterConfig | SpecialisedConfig


def weight_rows(outputs: int, kind: LinearKind) -> int:
    """Rows of weights in a tile, made up to a power of two."""
    rows = outputs * (2 if kind is LinearKind.GATED else 1)
    return 1 << (rows - 1).bit_length()


def check_rows(config: RegisterConfig | SpecialisedConfig, kind: LinearKind) -> None:
    """Refuse tiles that these kernels have no room for.

    Raises:
        ValueError: a tile has more than 64 rows of weights, or, in registers, fewer than 16.
    """
    rows = weight_rows(config.outputs, kind)
    fewest = 16 if isinstance(config, RegisterConfig) else 1
    if not fewest <= rows <= MOST_ROWS:
        raise ValueError(
            f"{config.outputs} outputs of the {kind.value} form are {rows} rows of weights, a tile of "
            f"{type(config).__name__} has {fewest} to {MOST_ROWS}: choose outputs that give so many"
        )


def fit(
    config: LinearConfig, kind: LinearKind, shared_memory_bytes: int, weight_bits: int = 16
) -> LinearConfig:
    """The configuration with as many stages as a program's shared memory holds, two at least."""
    while config.stages > 2 and config.shared_memory_bytes(kind, weight_bits) > shared_memory_bytes:
        config = replace(config, stages=config.stages - 1)
    return config
