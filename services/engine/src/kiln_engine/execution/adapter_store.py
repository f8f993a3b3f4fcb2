"""LoRA adapters on the device, and the linear layers of a step in which each row has its own.

All adapters of a step run together: for a linear layer, `h = x A^T` over the stacked A of every
adapter in the batch, `h` kept where the row uses the adapter (times its scale), `y += h B^T` over
the stacked B. Rows may use several adapters, which then add up. Two products a layer whatever the
mix; none at all for a batch without adapters.

Legend: `S` slots, `T` tokens, `I`/`O` inputs and outputs of a linear layer, `r` rank, `Q` ranks of
all adapters of the step side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kiln_common.errors import InvalidRequest
from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model import to_device
from kiln_nn.blocks import LinearFn
from kiln_nn.config import ModelConfig
from kiln_nn.errors import KilnNnError
from kiln_nn.lora import adapter_table, parse_adapter


class AdapterRejected(InvalidRequest):
    """The bytes are not a LoRA adapter of this model; code and hint say what is wrong with them."""

    code = "invalid_adapter"

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class AdapterRankTooHigh(InvalidRequest):
    code = "adapter_rank_too_high"
    hint = "Train with a lower rank, or start the engine with a higher max_adapter_rank."

    def __init__(self, rank: int, limit: int) -> None:
        super().__init__(f"the adapter has rank {rank}, this engine holds up to {limit}")


def adapter_slot_bytes(config: ModelConfig, max_rank: int, dtype: torch.dtype) -> int:
    """Bytes of one adapter slot."""
    widths = sum(inputs + outputs for inputs, outputs in adapter_table(config).values())
    return max_rank * widths * dtype.itemsize


@dataclass(frozen=True)
class _Resident:
    rank: int
    scaling: float
    module_paths: frozenset[str]


# (A [Q, I], B [O, Q]) of the step's adapters that have the layer, and those adapters' slots.
_Stack = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]


class AdapterStore:
    """Stacked A and B of `num_slots` adapters for every linear layer; slot 0 is the base model.

    Slots are numbered 1 to `num_slots`. `stage` may run on any thread because it writes only to a
    slot that no step reads; `activate`, `clear` and `linear_for` belong to the loop thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._config = config
        self._tables = {
            path: (
                torch.zeros(num_slots, max_rank, inputs, dtype=dtype, device=device),
                torch.zeros(num_slots, outputs, max_rank, dtype=dtype, device=device),
            )
            for path, (inputs, outputs) in adapter_table(config).items()
        }
        self._device = device
        self._staged: dict[int, _Resident] = {}
        self._resident: dict[int, _Resident] = {}
        # Stacks of the last combination of slots; a batch usually has the one before it had.
        self._stacked_slots: tuple[int, ...] = ()
        self._stacks: dict[str, _Stack] = {}

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self._tables.values())

    @property
    def active_slots(self) -> frozenset[int]:
        """Slots that rows may name."""
        return frozenset(self._resident)

    def stage(self, slot: int, adapter_bytes: bytes, config_json: str) -> None:
        """Parse PEFT safetensors and upload them into a slot that is not active.

        Raises:
            AdapterRejected: not a plain LoRA of this model's linear layers, or values that are
                not finite; nothing was written.
            AdapterRankTooHigh: a rank above `max_rank`; nothing was written.
        """
        assert 0 < slot <= self.num_slots, slot
        assert slot not in self._resident, slot
        self._staged.pop(slot, None)
        try:
            adapter = parse_adapter(config_json, adapter_bytes, self._config)
        except KilnNnError as error:
            raise AdapterRejected(error) from error
        rank = adapter.spec.rank
        if rank > self.max_rank:
            raise AdapterRankTooHigh(rank, self.max_rank)
        for path, (a_rI, b_Or) in adapter.tensors.items():
            a_table, b_table = self._tables[path]
            a_table[slot - 1, :rank].copy_(a_rI)
            b_table[slot - 1, :, :rank].copy_(b_Or)
        self._staged[slot] = _Resident(rank, adapter.spec.scaling, frozenset(adapter.tensors))

    def activate(self, slot: int) -> None:
        """Let rows name the slot, with what was staged last."""
        self._resident[slot] = self._staged.pop(slot)
        self._forget_stacks(slot)

    def clear(self, slot: int) -> None:
        """Forget the slot; the next `stage` overwrites its numbers."""
        self._staged.pop(slot, None)
        if self._resident.pop(slot, None):
            self._forget_stacks(slot)

    def linear_for(self, plan: BatchPlan, base_linear: LinearFn) -> LinearFn:
        """The linear layers of one step, each token with its row's adapters on top of `base_linear`.

        `base_linear` must give outputs that may be added to in place. Without adapters it is returned
        as it is.
        """
        uses = _adapter_uses(plan)
        if not uses:
            return base_linear
        slots = tuple(sorted(uses))
        if slots != self._stacked_slots:
            self._stacked_slots, self._stacks = slots, {}
        factors = _Factors(
            plan.num_tokens,
            {slot: _scaled(use, self._resident[slot].scaling) for slot, use in uses.items()},
            {slot: self._resident[slot].rank for slot in slots},
            next(iter(self._tables.values()))[0].dtype,
            self._device,
        )

        def linear(module_path: str, x_TI: torch.Tensor) -> torch.Tensor:
            y_TO = base_linear(module_path, x_TI)
            stack = self._stacks.get(module_path) or self._stack(module_path, slots)
            a_QI, b_OQ, having = stack
            if not having:
                return y_TO
            return y_TO.addmm_(factors.apply_(F.linear(x_TI, a_QI), having), b_OQ.t())

        return linear

    def _stack(self, module_path: str, slots: tuple[int, ...]) -> _Stack:
        having = tuple(slot for slot in slots if module_path in self._resident[slot].module_paths)
        a_table, b_table = self._tables[module_path]
        ranks = [self._resident[slot].rank for slot in having]
        a_parts = [a_table[slot - 1, :rank] for slot, rank in zip(having, ranks, strict=True)]
        b_parts = [b_table[slot - 1, :, :rank] for slot, rank in zip(having, ranks, strict=True)]
        stack: _Stack
        if len(having) == 1:
            stack = a_parts[0], b_parts[0], having
        elif having:
            stack = torch.cat(a_parts), torch.cat(b_parts, dim=1), having
        else:
            stack = a_table[0, :0], b_table[0, :, :0], having
        self._stacks[module_path] = stack
        return stack

    def _forget_stacks(self, slot: int) -> None:
        if slot in self._stacked_slots:
            self._stacked_slots, self._stacks = (), {}


# (token, scale) pairs of one slot.
_Use = list[tuple[int, float]]


def _adapter_uses(plan: BatchPlan) -> dict[int, _Use]:
    """Which tokens of the step use which slot, decode rows first as everywhere."""
    uses: dict[int, _Use] = {}
    for token, row in enumerate(plan.decode_rows):
        for slot, scale in row.adapter_slots:
            uses.setdefault(slot, []).append((token, scale))
    token = len(plan.decode_rows)
    for chunk in plan.prefill_chunks:
        end = token + len(chunk.token_ids)
        for slot, scale in chunk.adapter_slots:
            uses.setdefault(slot, []).extend((t, scale) for t in range(token, end))
        token = end
    uses.pop(0, None)  # slot 0 adds nothing
    return uses


def _scaled(use: _Use, scaling: float) -> _Use:
    return [(token, scale * scaling) for token, scale in use]


class _Factors:
    """How much of each adapter each token gets, as factors on the columns of `h`."""

    def __init__(
        self,
        num_tokens: int,
        uses: dict[int, _Use],
        ranks: dict[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._ranks = ranks
        self._columns = {}
        for slot, use in uses.items():
            # A row may name one adapter twice: then its scales add up.
            column = [0.0] * num_tokens
            for token, scale in use:
                column[token] += scale
            self._columns[slot] = column
        self._dtype, self._device = dtype, device
        self._by_slots: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def apply_(self, h_TQ: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
        """Scale in place the columns of the given slots' ranks, zero where a token does not use them."""
        if slots not in self._by_slots:
            self._by_slots[slots] = self._make(slots)
        factor, is_unused = self._by_slots[slots]
        if is_unused is not None:
            # Not by a product: another row's overflow times zero would be a NaN here.
            h_TQ.masked_fill_(is_unused, 0.0)
        return h_TQ.mul_(factor)

    def _make(self, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        columns = torch.tensor([self._columns[slot] for slot in slots], dtype=torch.float32).t()
        if len(slots) > 1:
            columns = columns.repeat_interleave(torch.tensor([self._ranks[slot] for slot in slots]), dim=1)
        is_unused = columns == 0
        return (
            to_device(columns.to(self._dtype), self._device),
            to_device(is_unused, self._device) if bool(is_unused.any()) else None,
        )
