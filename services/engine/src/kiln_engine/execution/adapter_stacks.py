"""A step's adapters side by side, for devices without the kernel: few products whatever the mixture.

For a linear layer, `h = x A^T` over the stacked A of every adapter in the step, `h` kept where the
token uses the adapter (times its scale), `y += h B` over the stacked B.

Legend: `S` slots, `T` tokens, `N` modules, `I`/`O` inputs and outputs, `Q` the stack's rows of A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kiln_engine.execution.adapter_rows import ResidentAdapter, in_order
from kiln_engine.execution.adapter_tables import AdaptedLinear, AdapterTables
from kiln_engine.model import to_device
from kiln_nn.kernels.lora import AdapterStack, TokenGroup, lora_add_stacked_


@dataclass(frozen=True)
class _SlotStack:
    """The stack of one linear layer, and the slots in it: those that have something for it."""

    slots: tuple[int, ...]
    stack: AdapterStack


class AdapterStacks:
    """Stacks of the last combination of slots; a batch usually has the one before it had."""

    def __init__(self, tables: AdapterTables) -> None:
        self._tables = tables
        self._slots: tuple[int, ...] = ()
        self._by_path: dict[str, _SlotStack | None] = {}

    def forget(self, slot: int) -> None:
        """The slot's numbers are about to change."""
        if slot in self._slots:
            self._slots, self._by_path = (), {}

    def get(
        self, path: str, slots: tuple[int, ...], resident: Mapping[int, ResidentAdapter]
    ) -> _SlotStack | None:
        """The stack of a linear layer, None if it cannot be adapted or none of the slots adapts it."""
        if slots != self._slots:
            self._slots, self._by_path = slots, {}
        if path not in self._by_path:
            linear = self._tables.get(path)
            self._by_path[path] = None if linear is None else _stacked(linear, slots, resident)
        return self._by_path[path]


def _stacked(
    linear: AdaptedLinear, slots: tuple[int, ...], resident: Mapping[int, ResidentAdapter]
) -> _SlotStack | None:
    having = tuple(slot for slot in slots if not linear.modules.isdisjoint(resident[slot].module_paths))
    if not having:
        return None
    a_SNRI = linear.a_SQI.unflatten(1, (linear.num_modules, -1))
    a_parts = [a_SNRI[slot - 1, :, : resident[slot].rank] for slot in having]
    b_parts = [linear.b_SRO[slot - 1, : resident[slot].rank] for slot in having]
    b_QO = torch.cat(b_parts)
    modules = tuple(b_QO[:, start:end].contiguous() for start, end in pairwise(linear.bounds))
    return _SlotStack(having, AdapterStack(torch.cat(a_parts, dim=1).flatten(0, 1), modules, linear.bounds))


class StackedRows:
    """How much of each adapter each token of one step gets, as factors on the columns of `h`."""

    def __init__(
        self,
        num_tokens: int,
        groups: Sequence[TokenGroup],
        stacks: AdapterStacks,
        resident: Mapping[int, ResidentAdapter],
        place: tuple[torch.device, torch.dtype],
    ) -> None:
        self._stacks, self._resident, self._place = stacks, resident, place
        self._columns: dict[int, torch.Tensor] = {}
        for group in groups:
            for use in group.uses:
                slot = use.table_index + 1
                if slot not in self._columns:
                    self._columns[slot] = torch.zeros(num_tokens)
                self._columns[slot][group.tokens] = use.scale
        self._slots = tuple(in_order(self._columns, resident))
        self._factors: dict[tuple[tuple[int, ...], int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def add_(self, path: str, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """Add every token's adapters to y in place."""
        found = self._stacks.get(path, self._slots, self._resident)
        if found is None:
            return
        key = (found.slots, len(found.stack.b_parts))
        factors = self._factors.get(key)
        if factors is None:
            factors = self._factors[key] = self._make(*key)
        lora_add_stacked_(y_TO, x_TI, found.stack, *factors)

    def _make(self, slots: tuple[int, ...], num_modules: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Factors of the stack's rows of A, and which of them are unused (None: not any)."""
        device, dtype = self._place
        columns = torch.stack([self._columns[slot] for slot in slots], dim=1)
        ranks = torch.tensor([self._resident[slot].rank for slot in slots])
        columns = columns.repeat_interleave(ranks, dim=1).repeat(1, num_modules)
        is_unused = columns == 0
        return (
            to_device(columns.to(dtype), device),
            to_device(is_unused, device) if bool(is_unused.any()) else None,
        )
