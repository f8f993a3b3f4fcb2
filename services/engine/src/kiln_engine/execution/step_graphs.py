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
from functools import partial

import structlog
import torch

from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.plan import BatchPlan, RowSampling
from kiln_engine.domain.speculation import most_lines
from kiln_engine.execution.captured_step import CapturedStep, Draw, GraphParts
from kiln_engine.execution.verify_graphs import VerifyGraph, verify_ladder
from kiln_engine.model import PrefillCapacity, copy_to
from kiln_engine.model.decode_layout import decode_fields, decode_layout
from kiln_engine.model.prefill_layout import prefill_numbers
from kiln_engine.model.step_layout import join_layouts

log = structlog.get_logger()

_PROGRESS_INTERVAL_S = 2.0
_PREFILL_TOKENS = (64, 128, 256)
PREFILL_CHUNKS = 8


class DecodeGraph:
    """The step of up to `capacity` decode rows, with or without adapters."""

    def __init__(self, parts: GraphParts, capacity: int, *, has_adapters: bool) -> None:
        self._shape = parts.model.shape
        self._capacity = capacity
        padding = torch.from_numpy(decode_fields((), self._shape, capacity))
        self._fields_FR = padding.to(parts.model.device)
        linears, self._adapter_rows = parts.adapters.static_linears(
            parts.model.matrices, capacity, has_adapters=has_adapters
        )
        layout = join_layouts(decode_layout(self._fields_FR), None)
        self._step = CapturedStep(parts, layout, linears)

    def run(self, plan: BatchPlan, rows: Sequence[RowSampling]) -> Draw | None:
        """Run the plan's decode rows."""
        fields = decode_fields(plan.decode_rows, self._shape, self._capacity)
        copy_to(self._fields_FR, torch.from_numpy(fields))
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(BatchPlan(plan.step_id, plan.decode_rows))
        self._step.replay()
        return partial(self._step.draw, rows) if rows else None


class PrefillGraph:
    """The step of chunks of up to `capacity` tokens in all, with or without adapters."""

    def __init__(self, parts: GraphParts, capacity: PrefillCapacity, *, has_adapters: bool) -> None:
        self._shape = parts.model.shape
        self._capacity = capacity
        padding = prefill_numbers((), self._shape, capacity)
        self._flat = torch.from_numpy(padding.flat).to(parts.model.device)
        layout = join_layouts(None, padding.layout(self._flat))
        linears, self._adapter_rows = parts.adapters.static_linears(
            parts.model.matrices, capacity.num_tokens, has_adapters=has_adapters
        )
        self._step = CapturedStep(parts, layout, linears)

    def run(self, plan: BatchPlan, rows: Sequence[RowSampling]) -> Draw | None:
        """Run the plan's chunks."""
        numbers = prefill_numbers(plan.prefill_chunks, self._shape, self._capacity)
        copy_to(self._flat, torch.from_numpy(numbers.flat))
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(BatchPlan(plan.step_id, prefill_chunks=plan.prefill_chunks))
        self._step.replay()
        return partial(self._step.draw, rows) if rows else None


class StepGraphs:
    """The captured steps of one model, by kind and size.

    The logits and the sampler of `parts` have room for `PREFILL_CHUNKS` rows and for the lines that
    `max_rows` sequences may have with drafts of up to `max_draft_tokens`.

    Raises (at construction): whatever a kernel raises that cannot run on this device or shape.
    """

    def __init__(self, parts: GraphParts, max_rows: int, max_draft_tokens: int = 0) -> None:
        num_lines = most_lines(max_rows, max_draft_tokens)
        assert parts.logits_RV.shape[0] >= max(num_lines, PREFILL_CHUNKS)
        self._parts = parts
        self.decode_sizes = decode_ladder(max_rows)
        self.prefill_sizes = _PREFILL_TOKENS
        self._decode: dict[tuple[int, bool], DecodeGraph] = {}
        self._prefill: dict[tuple[int, bool], PrefillGraph] = {}
        # By lines of a row, then the numbers of rows.
        self.verify_sizes = verify_ladder(max_rows, num_lines, max_draft_tokens)
        self._verify: dict[tuple[int, int, bool], VerifyGraph] = {}
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
        if len(chunks) > PREFILL_CHUNKS:
            return None
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        size = next((size for size in self.prefill_sizes if size >= num_tokens), None)
        return None if size is None else self._prefill[size, any(chunk.adapter_slots for chunk in chunks)]

    def for_verify(self, plan: BatchPlan) -> VerifyGraph | None:
        """The smallest graph that holds the plan's verify rows, if one does."""
        rows = plan.verify_rows
        if any(row.live_slot != row.state_slot for row in rows):
            return None
        lines = next((lines for lines in self.verify_sizes if lines >= plan.num_verify_lines), 0)
        size = next((size for size in self.verify_sizes.get(lines, ()) if size >= len(rows)), None)
        return None if size is None else self._verify[size, lines, any(row.adapter_slots for row in rows)]

    @torch.inference_mode()
    def _capture(self) -> None:
        """Largest first, so that the others find their memory in the pool."""
        parts, started_s = self._parts, time.monotonic()
        wanted: list[Callable[[], None]] = []
        for has_adapters in (False, True):
            for size in reversed(self.prefill_sizes):
                wanted.append(partial(self._capture_prefill, parts, size, has_adapters))
            for size in reversed(self.decode_sizes):
                wanted.append(partial(self._capture_decode, parts, size, has_adapters))
            for lines, sizes in self.verify_sizes.items():
                for size in reversed(sizes):
                    wanted.append(partial(self._capture_verify, parts, size, lines, has_adapters))
        logged_s = started_s
        for number, capture in enumerate(wanted, start=1):
            capture()
            now = time.monotonic()
            is_worth_telling = number == len(wanted) or now - logged_s >= _PROGRESS_INTERVAL_S
            if is_worth_telling and not parts.is_rehearsal:
                logged_s = now
                log.info("capturing_graphs", done=number, of=len(wanted), seconds=round(now - started_s, 1))

    def _capture_prefill(self, parts: GraphParts, size: int, has_adapters: bool) -> None:
        capacity = PrefillCapacity(size, PREFILL_CHUNKS)
        self._prefill[size, has_adapters] = PrefillGraph(parts, capacity, has_adapters=has_adapters)

    def _capture_decode(self, parts: GraphParts, size: int, has_adapters: bool) -> None:
        self._decode[size, has_adapters] = DecodeGraph(parts, size, has_adapters=has_adapters)

    def _capture_verify(self, parts: GraphParts, size: int, lines: int, has_adapters: bool) -> None:
        self._verify[size, lines, has_adapters] = VerifyGraph(parts, size, lines, has_adapters=has_adapters)
