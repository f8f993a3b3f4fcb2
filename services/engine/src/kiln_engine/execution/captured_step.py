"""One pass and its draws as CUDA graphs over fixed buffers.

Legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kiln_engine.domain.plan import RowSampling
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.drafting import Drafter
from kiln_engine.execution.sampled_ids import DraftIds, SampledIds
from kiln_engine.execution.sampler import PendingDraws, Sampler, sample
from kiln_engine.model import Linears, PagedModel, StepLayout

# Draws the tokens of a pass that has been launched.
Draw = Callable[[], PendingDraws]


@dataclass(frozen=True)
class GraphParts:
    """What every captured step is made of. All of them write their logits to one place."""

    model: PagedModel
    adapters: AdapterStore
    sampler: Sampler
    sampled_ids: SampledIds
    draft_ids: DraftIds
    # None where drafts are not made by the model.
    drafter: Drafter | None
    logits_RV: torch.Tensor
    pool: Any
    # Steps are run once where they would be captured.
    is_rehearsal: bool = False


class _Rehearsed:
    """Stands where a graph would, after one run of what it would hold."""

    def __init__(self, run: Callable[[], None]) -> None:
        run()

    def replay(self) -> None:
        raise AssertionError("nothing was captured")


class CapturedStep:
    """One forward pass over fixed buffers, and the drawing of its samples."""

    def __init__(self, parts: GraphParts, layout: StepLayout, linears: Linears) -> None:
        self._parts = parts
        self._layout = layout
        self._capacity = layout.num_samples
        self._logits_RV = parts.logits_RV[: self._capacity]
        self._tables = parts.sampler.prepare((), self._capacity)
        self._forward = self._capture(partial(self._run_forward, linears))
        self._draw = self._capture(self._run_draw)

    def replay(self) -> None:
        """Run the pass for what is in the buffers."""
        self._forward.replay()

    def draw(self, rows: Sequence[RowSampling]) -> PendingDraws:
        """Draw the rows' tokens, before any other step runs: the logits of all lie in one place."""
        sampler = self._parts.sampler
        if sampler.needs_eager(rows):
            is_invariant = sampler.is_batch_invariant
            draws = sample(self._logits_RV[: len(rows)], rows, is_batch_invariant=is_invariant)
            self._keep(draws.token_ids_R)
            return draws
        sampler.prepare(rows, self._capacity)
        self._draw.replay()
        return sampler.pending(rows)

    def _run_forward(self, linears: Linears) -> None:
        self._feed()
        self._parts.model.forward(self._layout, linears, out=self._logits_RV)

    def _run_draw(self) -> None:
        self._keep(self._parts.sampler.launch(self._logits_RV, self._tables))

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | _Rehearsed:
        return _Rehearsed(run) if self._parts.is_rehearsal else _captured(run, self._parts.pool)

    def _feed(self) -> None:
        """Bring tokens that only the device knows into the layout."""
        self._parts.sampled_ids.feed_(self._layout)

    def _keep(self, token_ids_R: torch.Tensor) -> None:
        """Take over what the first rows have drawn."""
        self._parts.sampled_ids.keep_rows(self._layout.kept_slots[: len(token_ids_R)], token_ids_R)


def _captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches, after a first run that compiles what is not compiled yet."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
