"""Steps captured as CUDA graphs: two launches instead of hundreds.

A graph reads its rows from buffers that stay where they are; a step copies its numbers there and
replays the smallest graph that holds them, the places left over touch nothing. The forward pass and
the drawing of tokens are two graphs, because some rows are drawn in a way that no graph holds.
Graphs share one pool of memory, since only one runs at a time. What varies beyond that (a long
prompt, a row that moves to another slot) is launched piece by piece.

Legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch

from kiln_engine.domain.plan import BatchPlan, RowSampling
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.execution.sampler import PendingDraws, Sampler, sample
from kiln_engine.model import Linears, PagedModel, PrefillCapacity, StepLayout, copy_to
from kiln_engine.model.decode_layout import decode_fields, decode_layout
from kiln_engine.model.prefill_layout import prefill_numbers
from kiln_engine.model.step_layout import join_layouts

log = structlog.get_logger()

_PROGRESS_INTERVAL_S = 2.0
_PREFILL_TOKENS = (64, 128, 256)
PREFILL_CHUNKS = 8

# Draws the tokens of a pass that has been launched.
Draw = Callable[[], PendingDraws]


def decode_ladder(max_rows: int) -> list[int]:
    """Batch sizes worth a graph of their own: few enough to capture, dense enough to waste little."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, *range(160, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


@dataclass(frozen=True)
class GraphParts:
    """What every captured step is made of. All of them write their logits to one place."""

    model: PagedModel
    adapters: AdapterStore
    sampler: Sampler
    sampled_ids: SampledIds
    logits_RV: torch.Tensor
    pool: Any


class CapturedStep:
    """One forward pass over fixed buffers, and the drawing of its samples."""

    def __init__(self, parts: GraphParts, layout: StepLayout, linears: Linears) -> None:
        self._parts = parts
        self._layout = layout
        self._capacity = layout.kept_slots.shape[0]
        self._logits_RV = parts.logits_RV[: self._capacity]
        self._tables = parts.sampler.prepare((), self._capacity)
        self._forward = _captured(partial(self._run_forward, linears), parts.pool)
        self._draw = _captured(self._run_draw, parts.pool)

    def replay(self, rows: Sequence[RowSampling]) -> Draw | None:
        """Run the pass for what is in the buffers; returns what draws the rows' tokens.

        That has to be called before any other step runs: the logits of all lie in one place.
        """
        self._forward.replay()
        return partial(self._draw_rows, rows) if rows else None

    def _draw_rows(self, rows: Sequence[RowSampling]) -> PendingDraws:
        sampler = self._parts.sampler
        if sampler.needs_eager(rows):
            is_invariant = sampler.is_batch_invariant
            draws = sample(self._logits_RV[: len(rows)], rows, is_batch_invariant=is_invariant)
            self._parts.sampled_ids.keep_rows(self._layout.kept_slots[: len(rows)], draws.token_ids_R)
            return draws
        sampler.prepare(rows, self._capacity)
        self._draw.replay()
        return sampler.pending(rows)

    def _run_forward(self, linears: Linears) -> None:
        self._parts.sampled_ids.feed_(self._layout)
        self._parts.model.forward(self._layout, linears, out=self._logits_RV)

    def _run_draw(self) -> None:
        token_ids_R = self._parts.sampler.launch(self._logits_RV, self._tables)
        self._parts.sampled_ids.keep_rows(self._layout.kept_slots, token_ids_R)


class DecodeGraph:
    """The step of up to `capacity` decode rows, with or without adapters."""

    def __init__(self, parts: GraphParts, capacity: int, *, has_adapters: bool) -> None:
        self._shape = parts.model.shape
        self._capacity = capacity
        padding = torch.from_numpy(decode_fields((), self._shape, capacity))
        self._fields_FR = padding.to(parts.model.device)
        self._adapter_rows = parts.adapters.static_rows(capacity) if has_adapters else None
        adapters = None
        if self._adapter_rows is not None:
            adapters = parts.adapters.of_step(self._adapter_rows.rows)
        layout = join_layouts(decode_layout(self._fields_FR), None)
        self._step = CapturedStep(parts, layout, Linears(parts.model.matrices, adapters))

    def run(self, plan: BatchPlan, rows: Sequence[RowSampling]) -> Draw | None:
        """Run the plan's decode rows."""
        fields = decode_fields(plan.decode_rows, self._shape, self._capacity)
        copy_to(self._fields_FR, torch.from_numpy(fields))
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(BatchPlan(plan.step_id, plan.decode_rows))
        return self._step.replay(rows)


class PrefillGraph:
    """The step of chunks of up to `capacity` tokens in all, without adapters."""

    def __init__(self, parts: GraphParts, capacity: PrefillCapacity) -> None:
        self._shape = parts.model.shape
        self._capacity = capacity
        padding = prefill_numbers((), self._shape, capacity)
        self._flat = torch.from_numpy(padding.flat).to(parts.model.device)
        layout = join_layouts(None, padding.layout(self._flat))
        self._step = CapturedStep(parts, layout, Linears(parts.model.matrices))

    def run(self, plan: BatchPlan, rows: Sequence[RowSampling]) -> Draw | None:
        """Run the plan's chunks."""
        numbers = prefill_numbers(plan.prefill_chunks, self._shape, self._capacity)
        copy_to(self._flat, torch.from_numpy(numbers.flat))
        return self._step.replay(rows)


class StepGraphs:
    """The captured steps of one model, by kind and size.

    The logits and the sampler of `parts` have room for `max_rows` and for `PREFILL_CHUNKS` rows.

    Raises (at construction): whatever a kernel raises that cannot run on this device or shape.
    """

    def __init__(self, parts: GraphParts, max_rows: int) -> None:
        assert parts.logits_RV.shape[0] >= max(max_rows, PREFILL_CHUNKS)
        self._parts = parts
        self.decode_sizes = decode_ladder(max_rows)
        self.prefill_sizes = _PREFILL_TOKENS
        self._decode: dict[tuple[int, bool], DecodeGraph] = {}
        self._prefill: dict[int, PrefillGraph] = {}
        self._capture()

    def for_rows(self, plan: BatchPlan) -> DecodeGraph | None:
        """The smallest graph that holds the plan's decode rows, if one does."""
        rows = plan.decode_rows
        size = next((size for size in self.decode_sizes if size >= len(rows)), None)
        if size is None or any(row.state_commit_slot not in (None, row.state_slot) for row in rows):
            return None
        return self._decode.get((size, any(row.adapter_slots for row in rows)))

    def for_chunks(self, plan: BatchPlan) -> PrefillGraph | None:
        """The smallest graph that holds the plan's chunks, if one does; none holds what is read out."""
        chunks = plan.prefill_chunks
        if any(chunk.readout for chunk in chunks):
            return None
        if len(chunks) > PREFILL_CHUNKS or any(chunk.adapter_slots for chunk in chunks):
            return None
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        size = next((size for size in self.prefill_sizes if size >= num_tokens), None)
        return None if size is None else self._prefill[size]

    @torch.inference_mode()
    def _capture(self) -> None:
        """Largest first, so that the others find their memory in the pool."""
        parts, started_s = self._parts, time.monotonic()
        wanted: list[Callable[[], None]] = []
        for size in reversed(self.prefill_sizes):
            wanted.append(partial(self._capture_prefill, parts, size))
        for has_adapters in (False, True):
            for size in reversed(self.decode_sizes):
                wanted.append(partial(self._capture_decode, parts, size, has_adapters))
        logged_s = started_s
        for number, capture in enumerate(wanted, start=1):
            capture()
            now = time.monotonic()
            if number == len(wanted) or now - logged_s >= _PROGRESS_INTERVAL_S:
                logged_s = now
                log.info("capturing_graphs", done=number, of=len(wanted), seconds=round(now - started_s, 1))

    def _capture_prefill(self, parts: GraphParts, size: int) -> None:
        self._prefill[size] = PrefillGraph(parts, PrefillCapacity(size, PREFILL_CHUNKS))

    def _capture_decode(self, parts: GraphParts, size: int, has_adapters: bool) -> None:
        self._decode[size, has_adapters] = DecodeGraph(parts, size, has_adapters=has_adapters)


def _captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches, after a first run that compiles what is not compiled yet."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
