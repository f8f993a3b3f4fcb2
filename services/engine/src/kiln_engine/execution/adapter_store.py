"""LoRA adapters on the device, and what they add to the linear layers of a step.

Each row of a step may use other adapters, several of them add up. Where the kernel runs, two
launches a linear layer serve any mixture, inside a captured graph too; elsewhere the step's
adapters are stacked into few products. Nothing runs for a batch without adapters.

Legend: `T` tokens, `I`/`O` inputs and outputs of a linear layer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from kiln_common.errors import InvalidRequest
from kiln_engine.domain.plan import BatchPlan
from kiln_engine.execution.adapter_rows import (
    ResidentAdapter,
    StaticLoraRows,
    groups_of,
    lora_rows,
    num_pass_tokens,
)
from kiln_engine.execution.adapter_stacks import AdapterStacks, StackedRows
from kiln_engine.execution.adapter_tables import AdapterTables, adapter_slot_bytes, largest_matrix_bytes
from kiln_engine.execution.adapter_upload import AdapterUploader
from kiln_engine.model.linears import BaseMatrices, Linears
from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidAdapter, KilnNnError
from kiln_nn.kernels.lora import LoraRows, TokenGroup, lora_add_, lora_shrink
from kiln_nn.lora import AdapterLayout, file_header, read_layout
from kiln_nn.weights.host_memory import readonly_u8

if TYPE_CHECKING:
    from kiln_nn.kernels.lora.triton import Shrunk

__all__ = ["AdapterRankTooHigh", "AdapterRejected", "AdapterRows", "AdapterStore", "adapter_slot_bytes"]

# Which adapters the tokens of one step use, as the device at hand wants it.
AdapterRows = LoraRows | StackedRows


class AdapterRejected(InvalidRequest):
    """The bytes are not a LoRA adapter of this model; code and hint say what is wrong with them."""

    code = "invalid_adapter"

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class AdapterRankTooHigh(InvalidRequest):
    """The adapter's rank is higher than the engine's slots hold."""

    code = "adapter_rank_too_high"
    hint = "Train with a lower rank, or start the engine with a higher max_adapter_rank."

    def __init__(self, rank: int, limit: int) -> None:
        super().__init__(f"the adapter has rank {rank}, this engine holds up to {limit}")


class AdapterStore:
    """A and B of `num_slots` adapters for every linear layer; slot 0 is the base model.

    `with_mtp`: for those of the multi-token-prediction layer as well, which makes the drafts. Otherwise an
    adapter's matrices for it have their names and shapes checked, and are left aside.

    Slots are numbered 1 to `num_slots`. `stage` may run on any thread because it writes only to a
    slot that no step reads; everything else belongs to the loop thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        with_mtp: bool = False,
        is_batch_invariant: bool = False,
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._config = config
        self._device = device
        self._is_batch_invariant = is_batch_invariant
        self._tables = AdapterTables(config, num_slots, max_rank, dtype, device, with_mtp=with_mtp)
        self._stacks = AdapterStacks(self._tables)
        self._uploader: AdapterUploader | None = None
        if self._tables.uses_kernel:
            largest = largest_matrix_bytes(config, max_rank, with_mtp=with_mtp)
            self._uploader = AdapterUploader(self._tables.places, largest, device)
        # Every version of an adapter has the same header.
        self._read_layout = lru_cache(maxsize=8)(self._read_layout_anew)
        self._staged: dict[int, ResidentAdapter] = {}
        self._resident: dict[int, ResidentAdapter] = {}

    @property
    def num_bytes(self) -> int:
        return self._tables.num_bytes + (self._uploader.num_bytes if self._uploader else 0)

    @property
    def active_slots(self) -> frozenset[int]:
        """Slots that rows may name."""
        return frozenset(self._resident)

    def stage(self, slot: int, adapter_bytes: bytes | memoryview, config_json: str) -> None:
        """Check PEFT safetensors and bring them into a slot that is not active.

        Raises:
            AdapterRejected: not a plain LoRA of this model's linear layers, or values that are
                not finite; the slot cannot be activated.
            AdapterRankTooHigh: a rank above `max_rank`; nothing was written.
        """
        assert 0 < slot <= self.num_slots, slot
        assert slot not in self._resident, slot
        self._staged.pop(slot, None)
        file_u8 = readonly_u8(adapter_bytes)
        try:
            layout = self._read_layout(config_json, file_header(file_u8), len(file_u8))
            if layout.spec.rank > self.max_rank:
                raise AdapterRankTooHigh(layout.spec.rank, self.max_rank)
            self._write(slot - 1, layout, file_u8)
        except KilnNnError as error:
            raise AdapterRejected(error) from error
        digest = hashlib.sha256(adapter_bytes).hexdigest() if self._is_batch_invariant else ""
        self._staged[slot] = ResidentAdapter(
            layout.spec.rank, layout.spec.scaling, frozenset(layout.pairs), digest
        )

    def activate(self, slot: int) -> None:
        """Let rows name the slot, with what was staged last."""
        self._resident[slot] = self._staged.pop(slot)
        self._stacks.forget(slot)

    def clear(self, slot: int) -> None:
        """Forget the slot; the next `stage` overwrites its numbers."""
        self._staged.pop(slot, None)
        if self._resident.pop(slot, None):
            self._stacks.forget(slot)

    def rows_for(self, plan: BatchPlan, num_lines: int = 0) -> AdapterRows | None:
        """Which adapters the plan's tokens use, decode rows first, brought to the device in one copy.

        Verify rows have `num_lines` each, or as many as the longest. None if no token uses any: then there is
        nothing to add.
        """
        groups = self._groups_of(plan, num_lines)
        if not groups:
            return None
        if self._tables.uses_kernel:
            return lora_rows(groups, self._device, is_batch_invariant=self._is_batch_invariant)
        place = (self._device, self._tables.dtype)
        return StackedRows(num_pass_tokens(plan, num_lines), groups, self._stacks, self._resident, place)

    def static_rows(self, num_tokens: int) -> StaticLoraRows:
        """Rows in fixed device memory for CUDA graphs of up to so many tokens; they begin empty."""
        return StaticLoraRows(num_tokens, self.num_slots, self._device, self._groups_of)

    def static_linears(
        self, matrices: BaseMatrices, num_tokens: int, *, has_adapters: bool
    ) -> tuple[Linears, StaticLoraRows | None]:
        """The linear layers of a graph of up to so many tokens, and the rows to fill before each replay, if any."""
        if not has_adapters:
            return Linears(matrices), None
        rows = self.static_rows(num_tokens)
        return Linears(matrices, self.of_step(rows.rows)), rows

    def shrink(self, path: str, x_TI: torch.Tensor, rows: AdapterRows) -> Shrunk | None:
        """The half of `add_` that needs no y, to be launched before y is made; None where `add_` does it."""
        linear = self._tables.get(path)
        if linear is None or isinstance(rows, StackedRows):
            return None
        return lora_shrink(x_TI, linear.a_SQI, rows, linear.bounds)

    def add_(
        self,
        path: str,
        x_TI: torch.Tensor,
        y_TO: torch.Tensor,
        rows: AdapterRows,
        shrunk: Shrunk | None = None,
    ) -> None:
        """Add to y what each token's adapters make of x, in place; `shrunk` if `shrink` began it.

        `path` is a fused linear layer's (`model.layers.3.self_attn.qkv_proj`) or a single module's
        (`....q_proj`, y being that module's outputs). Nothing happens for a layer that cannot be
        adapted. y may have a row stride and another format than x.
        """
        if isinstance(rows, StackedRows):
            rows.add_(path, x_TI, y_TO)
            return
        linear = self._tables.get(path)
        if linear is not None:
            lora_add_(y_TO, x_TI, linear.a_SQI, linear.b_SRO, rows, linear.bounds, shrunk)

    def of_step(self, rows: AdapterRows) -> AdaptersOfStep:
        """What the model's linear layers call."""
        return AdaptersOfStep(self, rows)

    def _read_layout_anew(self, config_json: str, header: bytes, num_file_bytes: int) -> AdapterLayout:
        return read_layout(config_json, header, num_file_bytes, self._config)

    def _write(self, index: int, layout: AdapterLayout, file_u8: torch.Tensor) -> None:
        """Raises InvalidAdapter for values that are not finite."""
        if self._uploader is not None and layout.dtype is not None:
            if self._uploader.upload(index, layout, file_u8):
                return
            # Finite in the file, and too large for this model's format, is all that is left then.
            layout.check_values(file_u8)
            raise InvalidAdapter(f"a value is too large for {self._tables.dtype}")
        layout.check_values(file_u8)
        self._tables.write(index, layout.views(file_u8))

    def _groups_of(self, plan: BatchPlan, num_lines: int = 0) -> list[TokenGroup]:
        return groups_of(plan, self._resident, num_lines)


@dataclass(frozen=True)
class AdaptersOfStep:
    """The store's adapters as one step uses them."""

    store: AdapterStore
    rows: AdapterRows

    def begin(self, path: str, x_TI: torch.Tensor) -> Shrunk | None:
        return self.store.shrink(path, x_TI, self.rows)

    def finish(self, path: str, x_TI: torch.Tensor, y_TO: torch.Tensor, begun: Shrunk | None) -> None:
        self.store.add_(path, x_TI, y_TO, self.rows, begun)
