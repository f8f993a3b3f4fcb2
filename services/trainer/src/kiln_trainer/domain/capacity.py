"""What a job needs of the trainer's memory, in bytes: numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FLOAT32_BYTES = 4
# Beside a parameter: its gradient and AdamW's two moments.
_FLOATS_BESIDE_A_PARAMETER = 3


@dataclass(frozen=True, slots=True)
class Capacity:
    """A trainer's memory, and what a token costs there, as measured.

    `base_shared_bytes` are the engine's and cost the trainer nothing; `base_copied_bytes` are a copy of
    its own, which is there already. `available_bytes` is what training may take besides.
    `token_bytes`: the least of one token in a micro-batch, every layer being computed again.
    `fixed_bytes`: of a micro-batch of any size. `copy_bytes`: of one adapter parameter in the format of
    the base weights, 0 where that is float32.
    """

    available_bytes: int
    base_shared_bytes: int
    base_copied_bytes: int
    token_bytes: float
    fixed_bytes: int = 0
    copy_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What one job takes, by what it takes it for."""

    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.adapter_bytes + self.optimizer_bytes + self.activation_bytes


def memory_needs(
    capacity: Capacity, rank: int, shapes: Iterable[tuple[int, int]], num_tokens: int
) -> MemoryNeeds:
    """Of an adapter of `rank` on layers of (in, out) features, with micro-batches of `num_tokens`."""
    num_parameters = sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    return MemoryNeeds(
        adapter_bytes=num_parameters * (_FLOAT32_BYTES + capacity.copy_bytes),
        optimizer_bytes=num_parameters * _FLOAT32_BYTES * _FLOATS_BESIDE_A_PARAMETER,
        activation_bytes=round(num_tokens * capacity.token_bytes) + capacity.fixed_bytes,
    )


def largest_batch(capacity: Capacity, needs: MemoryNeeds) -> int:
    """The most tokens of a micro-batch for which there is room; 0 where there is none for any."""
    room = capacity.available_bytes - capacity.fixed_bytes - needs.adapter_bytes - needs.optimizer_bytes
    return max(0, int(room / capacity.token_bytes))
