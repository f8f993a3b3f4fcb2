"""Random DeltaNet layers, slots and tokens for tests of the decode step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.gated_delta import DeltaRing
from tests.support.triton_kernels import relative_error


@dataclass(frozen=True)
class DeltaShape:
    """Sizes of one layer and its slots."""

    num_key_heads: int = 2
    num_heads: int = 4
    key_dim: int = 16
    value_dim: int = 32
    conv_width: int = 4
    capacity: int = 16
    page_tokens: int = 16
    num_slots: int = 8

    @property
    def num_channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim


def random_weights(shape: DeltaShape, draw: torch.Generator) -> DeltaDecodeWeights:
    """Float64 parameters; the heads' half-lives are log-uniform between 1 and 4,096 tokens."""
    half_lives = 4096.0 ** torch.rand(shape.num_heads, generator=draw, dtype=torch.float64)
    dt_bias = torch.rand(shape.num_heads, generator=draw, dtype=torch.float64) * 6 - 5
    rates = math.log(2.0) / half_lives / torch.nn.functional.softplus(dt_bias)
    return DeltaDecodeWeights(
        conv_CW=torch.randn(shape.num_channels, shape.conv_width, generator=draw, dtype=torch.float64) / 2,
        A_log_H=rates.log(),
        dt_bias_H=dt_bias,
        norm_V=torch.rand(shape.value_dim, generator=draw, dtype=torch.float64) + 0.5,
        norm_eps=1e-6,
    )


def empty_memory(shape: DeltaShape) -> DeltaMemory:
    """Slots of zeros, float64."""

    def zeros(*sizes: int) -> torch.Tensor:
        return torch.zeros(shape.num_slots, *sizes, dtype=torch.float64)

    return DeltaMemory(
        zeros(shape.num_heads, shape.key_dim, shape.value_dim),
        DeltaRing(
            zeros(shape.num_key_heads, shape.capacity, shape.key_dim),
            zeros(shape.num_heads, shape.capacity, shape.value_dim),
            zeros(shape.num_heads, shape.capacity),
        ),
        zeros(shape.conv_width - 1 + shape.capacity, shape.num_channels),
        shape.page_tokens,
    )


def random_memory(shape: DeltaShape, lengths: dict[int, int], draw: torch.Generator) -> DeltaMemory:
    """Random committed states and tails; the slots in `lengths` hold that many ring tokens.

    What no ring uses is NaN, so that whoever reads it shows.
    """

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    memory = empty_memory(shape)
    memory.state_SHKV.copy_(normal(*memory.state_SHKV.shape))
    ring, tail = memory.ring, shape.conv_width - 1
    memory.conv_rows_SQC[:, :tail] = normal(shape.num_slots, tail, shape.num_channels)
    for tensor in (ring.k_RhPK, ring.u_RHPV, ring.log_decay_RHP, memory.conv_rows_SQC[:, tail:]):
        tensor.fill_(math.nan)
    for slot, length in lengths.items():
        keys = normal(shape.num_key_heads, length, shape.key_dim)
        ring.k_RhPK[slot, :, :length] = keys / keys.norm(dim=-1, keepdim=True)
        ring.u_RHPV[slot, :, :length] = normal(shape.num_heads, length, shape.value_dim)
        ring.log_decay_RHP[slot, :, :length] = -normal(shape.num_heads, length).abs().cumsum(1) / 8
        memory.conv_rows_SQC[slot, tail : tail + length] = normal(length, shape.num_channels)
    return memory


@dataclass(frozen=True)
class Tokens:
    """One token's projections for every row."""

    mixed_RC: torch.Tensor
    a_RH: torch.Tensor
    b_RH: torch.Tensor
    z_RHV: torch.Tensor

    def all(self) -> tuple[torch.Tensor, ...]:
        return self.mixed_RC, self.a_RH, self.b_RH, self.z_RHV


def random_tokens(shape: DeltaShape, num_rows: int, draw: torch.Generator) -> Tokens:
    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(num_rows, *sizes, generator=draw, dtype=torch.float64)

    return Tokens(
        normal(shape.num_channels),
        normal(shape.num_heads),
        normal(shape.num_heads),
        normal(shape.num_heads, shape.value_dim),
    )


def stacked(lines: list[Tokens]) -> Tokens:
    """Several new tokens of every row, `[R, N, ...]`."""
    return Tokens(*(torch.stack(parts, 1) for parts in zip(*(line.all() for line in lines), strict=True)))


def make_rows(*rows: tuple[int, int, int, int | None] | None, device: str = "cpu") -> DeltaRows:
    """Rows of (read slot, ring slot, length, commit slot or None); None is a padding row."""
    numbers = [(NO_SLOT, NO_SLOT, 0, None) if row is None else row for row in rows]
    columns = torch.tensor([[NO_SLOT if n is None else n for n in row] for row in numbers]).to(device)
    return DeltaRows(*(columns[:, i].contiguous() for i in range(4)))


def converted(memory: DeltaMemory, state: torch.dtype, conv: torch.dtype, device: str = "cpu") -> DeltaMemory:
    """A copy on a device with the formats a store would have: state, float32 ring, conv rows."""
    ring_dtype = torch.float64 if state is torch.float64 else torch.float32
    return DeltaMemory(
        memory.state_SHKV.to(device, state, copy=True),
        DeltaRing(
            *(x.to(device, ring_dtype, copy=True) for x in vars(memory.ring).values()),
        ),
        memory.conv_rows_SQC.to(device, conv, copy=True),
        memory.page_tokens,
    )


def exact(memory: DeltaMemory) -> DeltaMemory:
    """A float64 copy on the CPU of what a memory holds, nonsense replaced by zeros."""
    copy = converted(memory, torch.float64, torch.float64)
    for tensor in memory_tensors(copy):
        tensor.nan_to_num_(0.0)
    return copy


def memory_tensors(memory: DeltaMemory) -> tuple[torch.Tensor, ...]:
    ring = memory.ring
    return memory.state_SHKV, ring.k_RhPK, ring.u_RHPV, ring.log_decay_RHP, memory.conv_rows_SQC


def layers_stacked(layers: list[DeltaMemory]) -> DeltaMemory:
    """One memory whose tensors have the layers as their first dimension; a copy."""
    state, *ring, conv_rows = (torch.stack(parts) for parts in zip(*map(memory_tensors, layers), strict=True))
    return DeltaMemory(state, DeltaRing(*ring), conv_rows, layers[0].page_tokens)


def weights_to(weights: DeltaDecodeWeights, dtype: torch.dtype, device: str = "cpu") -> DeltaDecodeWeights:
    """The large ones in `dtype`; A_log and dt_bias in float32, unless everything is float64."""
    gates = torch.float64 if dtype is torch.float64 else torch.float32
    return replace(
        weights,
        conv_CW=weights.conv_CW.to(device, dtype),
        norm_V=weights.norm_V.to(device, dtype),
        A_log_H=weights.A_log_H.to(device, gates),
        dt_bias_H=weights.dt_bias_H.to(device, gates),
    )


def tokens_to(tokens: Tokens, dtype: torch.dtype, device: str = "cpu") -> Tokens:
    return Tokens(*(x.to(device, dtype) for x in tokens.all()))


def assert_written_alike(
    before: DeltaMemory,
    after: DeltaMemory,
    expected: DeltaMemory,
    state_tolerance: float,
    ring_tolerance: float,
) -> None:
    """Everything written is close to the reference's, everything else bit for bit what it was."""
    reference_before = memory_tensors(exact(before))
    for was, now, reference_was, reference in zip(
        memory_tensors(before),
        memory_tensors(after),
        reference_before,
        memory_tensors(expected),
        strict=True,
    ):
        written = reference != reference_was
        is_same = (now == was) | (now.isnan() & was.isnan())
        assert is_same.cpu()[~written].all()
        tolerance = state_tolerance if now is after.state_SHKV else ring_tolerance
        assert relative_error(now.cpu()[written], reference[written]) < tolerance
