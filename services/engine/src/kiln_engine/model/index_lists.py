"""Lists of numbers that travel to the device together, and the shapes they count in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_engine.model.transfers import to_device


@dataclass(frozen=True)
class StoreShape:
    """The numbers of the stores that decide where things lie."""

    page_tokens: int
    num_tail_rows: int  # J
    ring_capacity: int  # P

    @property
    def conv_rows_per_slot(self) -> int:
        return self.num_tail_rows + self.ring_capacity


class IndexLists:
    """Lists of numbers that become views of one device tensor."""

    def __init__(self) -> None:
        self._lists: list[list[int]] = []

    def add(self, numbers: list[int]) -> int:
        """Returns the list's place among the tensors of `to_device`."""
        self._lists.append(numbers)
        return len(self._lists) - 1

    def to_device(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        numbers = torch.tensor([number for part in self._lists for number in part], dtype=torch.long)
        return to_device(numbers, device).split([len(part) for part in self._lists])
