"""Which adapters each token of a plan uses, brought to the device in one copy.

Legend: `S` slots, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model import to_device
from kiln_nn.kernels.lora import (
    DECODE_TILE_TOKENS,
    PREFILL_TILE_TOKENS,
    AdapterUse,
    LoraRows,
    RowsShape,
    TokenRun,
    pack_exactly,
    pack_runs,
)

# From here on larger tiles, which read A and B less often, still fill the device.
_MANY_TOKENS = 256
# Copies that may be under way while the next one is written: the steps launched ahead, and one.
_NUM_HOST_BUFFERS = 3


@dataclass(frozen=True)
class ResidentAdapter:
    """What a step must know of an adapter: its rank, its scaling, the modules it adapts."""

    rank: int
    scaling: float
    module_paths: frozenset[str]


def runs_of(plan: BatchPlan, resident: Mapping[int, ResidentAdapter]) -> list[TokenRun]:
    """The plan's tokens that use adapters, decode rows first as everywhere; slot 0 adds nothing."""
    uses_of: dict[tuple[tuple[int, float], ...], tuple[AdapterUse, ...]] = {(): ()}
    runs = []

    def add(first_token: int, num_tokens: int, adapter_slots: tuple[tuple[int, float], ...]) -> None:
        uses = uses_of.get(adapter_slots)
        if uses is None:
            uses = uses_of[adapter_slots] = _uses(adapter_slots, resident)
        if uses:
            runs.append(TokenRun(first_token, num_tokens, uses))

    for token, row in enumerate(plan.decode_rows):
        add(token, 1, row.adapter_slots)
    token = len(plan.decode_rows)
    for chunk in plan.prefill_chunks:
        add(token, len(chunk.token_ids), chunk.adapter_slots)
        token += len(chunk.token_ids)
    return runs


def _uses(
    adapter_slots: tuple[tuple[int, float], ...], resident: Mapping[int, ResidentAdapter]
) -> tuple[AdapterUse, ...]:
    """By slot, so that rows that name the same adapters in another order share tiles."""
    scales: dict[int, float] = {}
    for slot, scale in adapter_slots:
        # A row may name one adapter twice: then its scales add up.
        scales[slot] = scales.get(slot, 0.0) + scale
    return tuple(
        AdapterUse(slot - 1, resident[slot].rank, scales[slot] * resident[slot].scaling)
        for slot in sorted(scales)
        if slot
    )


def lora_rows(runs: list[TokenRun], device: torch.device) -> LoraRows:
    """Rows of exactly these runs."""
    num_tokens = sum(run.num_tokens for run in runs)
    words, shape = pack_exactly(
        runs, DECODE_TILE_TOKENS if num_tokens < _MANY_TOKENS else PREFILL_TILE_TOKENS
    )
    return LoraRows.over(to_device(torch.from_numpy(words), device), shape)


class StaticLoraRows:
    """Rows in device memory that stays where it is, for CUDA graphs of up to `num_tokens` tokens.

    Capture with `rows`; before each replay `fill_` says what the step's tokens use, in stream
    order: a step under way still reads what it was launched with. Belongs to the loop thread.
    """

    def __init__(
        self,
        num_tokens: int,
        num_slots: int,
        device: torch.device,
        runs_of: Callable[[BatchPlan], list[TokenRun]],
    ) -> None:
        self._num_tokens = num_tokens
        self._runs_of = runs_of
        self._shape = RowsShape.for_any(num_tokens, num_slots)
        # Zeros count no tiles.
        self._buffer = torch.zeros(self._shape.num_words, dtype=torch.int32, device=device)
        self.rows = LoraRows.over(self._buffer, self._shape)
        is_cuda = device.type == "cuda"
        self._host = [
            torch.zeros(self._shape.num_words, dtype=torch.int32, pin_memory=is_cuda)
            for _ in range(_NUM_HOST_BUFFERS if is_cuda else 1)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._host)
        self._next = 0

    def fill_(self, plan: BatchPlan) -> bool:
        """Copy the plan's uses to the device without waiting; tokens beyond the plan use nothing.

        Returns: whether any token uses an adapter.
        """
        assert plan.num_tokens <= self._num_tokens, (plan.num_tokens, self._num_tokens)
        runs = self._runs_of(plan)
        words = pack_runs(runs, self._shape)
        number, self._next = self._next, (self._next + 1) % len(self._host)
        copied = self._copied[number]
        if copied is not None:
            copied.synchronize()  # done long ago, unless the host is steps ahead
        host = self._host[number]
        np.copyto(host.numpy()[: len(words)], words)
        self._buffer[: len(words)].copy_(host[: len(words)], non_blocking=True)
        if host.is_pinned():
            self._copied[number] = copied or torch.cuda.Event()
            self._copied[number].record()  # type: ignore[union-attr]
        return bool(runs)
