"""Which adapters each token of a plan uses, brought to the device in one copy.

Legend: `S` slots, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    TokenGroup,
    pack_exactly,
    pack_groups,
)

# From here on larger tiles, which read A and B less often, still fill the device.
_MANY_TOKENS = 256
# Copies that may be under way while the next one is written: the steps launched ahead, and one.
_NUM_HOST_BUFFERS = 3


@dataclass(frozen=True)
class ResidentAdapter:
    """What a step must know of an adapter: its rank, its scaling, the modules it adapts.

    Adapters of one token are added in the order of `digest`, then of their slots, which depend on what
    else was loaded. The digest is empty where that may change the last bits.
    """

    rank: int
    scaling: float
    module_paths: frozenset[str]
    digest: str = ""


def groups_of(
    plan: BatchPlan, resident: Mapping[int, ResidentAdapter], num_lines: int = 0
) -> list[TokenGroup]:
    """The plan's tokens that use adapters, in the order of the pass; slot 0 adds nothing.

    Verify rows have `num_lines` each, or as many as the longest.
    """
    tokens_of: dict[tuple[tuple[int, float], ...], list[int]] = {}
    end = 0
    for adapter_slots, num_tokens in _runs_of(plan, num_lines):
        start, end = end, end + num_tokens
        if adapter_slots:
            tokens_of.setdefault(adapter_slots, []).extend(range(start, end))
    groups = [TokenGroup(tokens, _uses(slots, resident)) for slots, tokens in tokens_of.items()]
    return [group for group in groups if group.uses]


def _runs_of(plan: BatchPlan, num_lines: int) -> Iterator[tuple[tuple[tuple[int, float], ...], int]]:
    """(adapters, tokens) of each part of the pass."""
    for row in plan.decode_rows:
        yield row.adapter_slots, 1
    for verify in plan.verify_rows:
        yield verify.adapter_slots, num_lines or plan.num_verify_lines
    for chunk in plan.prefill_chunks:
        yield chunk.adapter_slots, len(chunk.token_ids)


def num_pass_tokens(plan: BatchPlan, num_lines: int = 0) -> int:
    """Tokens of the plan's pass, padding lines included; `num_lines` as in `groups_of`."""
    return sum(num_tokens for _, num_tokens in _runs_of(plan, num_lines))


def _uses(
    adapter_slots: tuple[tuple[int, float], ...], resident: Mapping[int, ResidentAdapter]
) -> tuple[AdapterUse, ...]:
    """In one order, so that rows that name the same adapters in another order share tiles."""
    scales: dict[int, float] = {}
    for slot, scale in adapter_slots:
        # A row may name one adapter twice: then its scales add up.
        scales[slot] = scales.get(slot, 0.0) + scale
    return tuple(
        AdapterUse(
            slot - 1, resident[slot].rank, scales[slot] * resident[slot].scaling, resident[slot].digest
        )
        for slot in in_order(filter(None, scales), resident)
    )


def in_order(slots: Iterable[int], resident: Mapping[int, ResidentAdapter]) -> list[int]:
    """Slots in the order in which a token's adapters are added."""
    return sorted(slots, key=lambda slot: (resident[slot].digest, slot))


def lora_rows(
    groups: list[TokenGroup], device: torch.device, *, is_batch_invariant: bool = False
) -> LoraRows:
    """Rows of exactly these groups; if batch-invariant, in the tiles that graphs have, which cut all sums alike."""
    num_tokens = sum(len(group.tokens) for group in groups)
    has_small_tiles = is_batch_invariant or num_tokens < _MANY_TOKENS
    words, shape = pack_exactly(groups, DECODE_TILE_TOKENS if has_small_tiles else PREFILL_TILE_TOKENS)
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
        groups_of: Callable[[BatchPlan, int], list[TokenGroup]],
    ) -> None:
        self._num_tokens = num_tokens
        self._groups_of = groups_of
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

    def fill_(self, plan: BatchPlan, num_lines: int = 0) -> bool:
        """Copy the plan's uses to the device without waiting; tokens beyond the plan use nothing.

        `num_lines` as in `groups_of`.

        Returns: whether any token uses an adapter.
        """
        num_tokens = num_pass_tokens(plan, num_lines)
        assert num_tokens <= self._num_tokens, (num_tokens, self._num_tokens)
        groups = self._groups_of(plan, num_lines)
        words = pack_groups(groups, self._shape)
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
        return bool(groups)
