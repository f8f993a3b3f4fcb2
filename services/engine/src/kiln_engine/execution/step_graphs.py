"""Forward passes captured as CUDA graphs: one launch instead of hundreds.

A graph reads its rows from buffers that stay where they are; a step copies its numbers there and
replays the smallest graph that holds them, the places left over touch nothing. Graphs share one pool
of memory because only one runs at a time. What varies beyond that (a long prompt, a row that moves
to another slot) is launched piece by piece.

Legend: `R` decode rows of a graph, `T`/`N` prefill tokens and chunks of one, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch

from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.model import Linears, PagedModel, PrefillCapacity, StepLayout, copy_to
from kiln_engine.model.decode_layout import decode_fields, decode_layout
from kiln_engine.model.prefill_layout import prefill_layout, prefill_numbers
from kiln_engine.model.step_layout import join_layouts

log = structlog.get_logger()

_PROGRESS_INTERVAL_S = 2.0
_PREFILL_TOKENS = (64, 128, 256)
_PREFILL_CHUNKS = 8


def decode_ladder(max_rows: int) -> list[int]:
    """Batch sizes worth a graph of their own: few enough to capture, dense enough to waste little."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, *range(160, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class CapturedPass:
    """One forward pass over fixed buffers; logits go to the first rows of a tensor all passes share."""

    def __init__(self, layout: StepLayout, forward: Callable[[], None], pool: Any) -> None:
        self.layout = layout
        forward()  # compiles what is not compiled yet, and tells what cannot run
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            forward()

    def replay(self) -> None:
        self._graph.replay()


class DecodePass:
    """The pass for up to `capacity` decode rows, with or without adapters."""

    def __init__(self, parts: PassParts, capacity: int, *, has_adapters: bool) -> None:
        self._shape = parts.model.kv.shape
        self._capacity = capacity
        padding = torch.from_numpy(decode_fields((), self._shape, capacity))
        self._fields_FR = padding.to(parts.model.device)
        layout = join_layouts(decode_layout(self._fields_FR), None)
        self._adapter_rows = parts.adapters.static_rows(capacity) if has_adapters else None
        linears = parts.linears(self._adapter_rows)
        self._captured = CapturedPass(layout, parts.forward(layout, linears, capacity), parts.pool)

    def run(self, plan: BatchPlan) -> StepLayout:
        """Replay for the plan's decode rows; returns where they lie."""
        copy_to(
            self._fields_FR, torch.from_numpy(decode_fields(plan.decode_rows, self._shape, self._capacity))
        )
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(plan)
        self._captured.replay()
        return self._captured.layout


class PrefillPass:
    """The pass for chunks of up to `capacity` tokens in all, without adapters."""

    def __init__(self, parts: PassParts, capacity: PrefillCapacity) -> None:
        self._shape = parts.model.kv.shape
        self._capacity = capacity
        padding = prefill_numbers((), self._shape, capacity)
        self._flat = torch.from_numpy(padding.flat).to(parts.model.device)
        layout = join_layouts(None, prefill_layout(padding, self._flat))
        forward = parts.forward(layout, parts.linears(None), capacity.num_chunks)
        self._captured = CapturedPass(layout, forward, parts.pool)

    def run(self, chunks: Sequence[PrefillChunk]) -> StepLayout:
        """Replay for the chunks; returns where they lie."""
        numbers = prefill_numbers(chunks, self._shape, self._capacity)
        copy_to(self._flat, torch.from_numpy(numbers.flat))
        self._captured.replay()
        return self._captured.layout


class PassParts:
    """What every captured pass is made of."""

    def __init__(
        self, model: PagedModel, adapters: AdapterStore, sampled_ids: SampledIds, logits_RV: torch.Tensor
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.pool = torch.cuda.graph_pool_handle()
        self._sampled_ids = sampled_ids
        self._logits_RV = logits_RV

    def linears(self, adapter_rows: Any) -> Linears:
        return self.adapters.linears_for(self.model.matrices, adapter_rows)

    def forward(self, layout: StepLayout, linears: Linears, num_samples: int) -> Callable[[], None]:
        """The pass as one function of nothing, to be captured."""

        def run() -> None:
            self._sampled_ids.feed_(layout)
            self.model.forward(layout, linears, self._logits_RV[:num_samples])

        return run


class StepGraphs:
    """The captured passes of one model, by kind and size.

    Raises (at construction): whatever a kernel raises that cannot run on this device or shape.
    """

    def __init__(self, parts: PassParts, max_rows: int) -> None:
        self._parts = parts
        self.decode_sizes = decode_ladder(max_rows)
        self.prefill_sizes = _PREFILL_TOKENS
        self._decode: dict[tuple[int, bool], DecodePass] = {}
        self._prefill: dict[int, PrefillPass] = {}
        self._capture()

    @property
    def num_graphs(self) -> int:
        return len(self._decode) + len(self._prefill)

    def decode_pass(self, plan: BatchPlan) -> DecodePass | None:
        """The smallest pass that holds the plan's decode rows, if one does."""
        size = next((size for size in self.decode_sizes if size >= len(plan.decode_rows)), None)
        if size is None or any(_moves(row) for row in plan.decode_rows):
            return None
        return self._decode.get((size, any(row.adapter_slots for row in plan.decode_rows)))

    def prefill_pass(self, plan: BatchPlan) -> PrefillPass | None:
        """The smallest pass that holds the plan's chunks, if one does."""
        chunks = plan.prefill_chunks
        if len(chunks) > _PREFILL_CHUNKS or any(chunk.adapter_slots for chunk in chunks):
            return None
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        size = next((size for size in self.prefill_sizes if size >= num_tokens), None)
        return None if size is None else self._prefill[size]

    @torch.inference_mode()
    def _capture(self) -> None:
        """Largest first, so that the smaller ones find their memory in the pool."""
        wanted: list[tuple[dict[Any, Any], Any, Callable[[], Any]]] = []
        for size in reversed(self.prefill_sizes):
            capacity = PrefillCapacity(size, _PREFILL_CHUNKS)
            wanted.append((self._prefill, size, lambda capacity=capacity: PrefillPass(self._parts, capacity)))
        for has_adapters in (False, True) if self._parts.adapters.num_slots else (False,):
            for size in reversed(self.decode_sizes):
                wanted.append(
                    (
                        self._decode,
                        (size, has_adapters),
                        lambda size=size, has=has_adapters: DecodePass(self._parts, size, has_adapters=has),
                    )
                )
        started_s = logged_s = time.monotonic()
        for number, (into, key, make) in enumerate(wanted, start=1):
            into[key] = make()
            now = time.monotonic()
            if number == len(wanted) or now - logged_s >= _PROGRESS_INTERVAL_S:
                logged_s = now
                log.info("capturing_graphs", done=number, of=len(wanted), seconds=round(now - started_s, 1))


def _moves(row: DecodeRow) -> bool:
    return row.state_commit_slot not in (None, row.state_slot)
