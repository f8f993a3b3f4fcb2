"""The step of verify rows captured as CUDA graphs: their pass, and their draws with what stands of the drafts.

Legend: `R` rows, `N` lines of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.execution.captured_step import CapturedStep, GraphParts
from kiln_engine.execution.drafting import DraftPass
from kiln_engine.execution.verifying import PendingVerify, line_samplings
from kiln_engine.model import Linears, copy_to
from kiln_engine.model.step_layout import lines_layout
from kiln_engine.model.verify_layout import VerifyLayout, verify_layout, verify_numbers
from kiln_nn.kernels.draft_rows import accept_lines


def verify_ladder(max_rows: int, num_most_lines: int, max_draft_tokens: int) -> dict[int, list[int]]:
    """By lines of a row the numbers of rows worth a graph: for one draft, and for as many as there may be."""
    if not max_draft_tokens:
        return {}
    ladder = {}
    for num_lines in sorted({2, 1 + max_draft_tokens}):
        most = min(max_rows, num_most_lines // num_lines)
        sizes = [2**power for power in range(most.bit_length()) if 2**power < most]
        ladder[num_lines] = [*sizes, most]
    return ladder


class _CapturedVerify(CapturedStep):
    """`accepted_R` has after each draw how many lines of each row stand; `drafts` goes on from there."""

    def __init__(self, parts: GraphParts, layout: VerifyLayout, linears: Linears) -> None:
        self._verify = layout
        self.accepted_R = torch.ones_like(layout.num_new_R)
        self.drafts: DraftPass | None = None
        if parts.drafter is not None:
            capacity, has_adapters = layout.num_new_R.shape[0], linears.adapters is not None
            self.drafts = parts.drafter.of(capacity, has_adapters=has_adapters)
        super().__init__(parts, lines_layout(layout), linears)
        if self.drafts is not None and not self.drafts.is_captured:
            self.drafts.run_all_steps = self._capture(self.drafts.all_steps).replay
            # They begin again: what was captured has been run, and there is room for no more.
            self._run_draw()
            self.drafts.run_step = self._capture(self.drafts.step).replay

    def _feed(self) -> None:
        verify = self._verify
        self._parts.draft_ids.feed_lines_(verify.token_ids_RN, verify.delta.ring_slots_R)

    def _keep(self, token_ids_R: torch.Tensor) -> None:
        verify = self._verify
        drawn_RN = token_ids_R.view(-1, verify.num_lines)
        num_rows = drawn_RN.shape[0]
        accepted_R = self.accepted_R[:num_rows]
        accept_lines(verify.token_ids_RN[:num_rows], drawn_RN, verify.num_new_R[:num_rows], accepted_R)
        if self.drafts is not None:
            self.drafts.begin(verify, drawn_RN, accepted_R)


class VerifyGraph:
    """The step of up to `capacity` verify rows of `num_lines` each, with or without adapters."""

    def __init__(self, parts: GraphParts, capacity: int, num_lines: int, *, has_adapters: bool) -> None:
        self._shape = parts.model.shape
        self._capacity, self._num_lines = capacity, num_lines
        padding = verify_numbers((), self._shape, num_lines, capacity)
        self._numbers = torch.from_numpy(padding).to(parts.model.device)
        linears, self._adapter_rows = parts.adapters.static_linears(
            parts.model.matrices, capacity * num_lines, has_adapters=has_adapters
        )
        layout = verify_layout(self._numbers, num_lines)
        self._step = _CapturedVerify(parts, layout, linears)

    def run(self, plan: BatchPlan, drafts: Sequence[Sequence[int]]) -> PendingVerify:
        """Run the plan's verify rows, draw, and draft; `drafts` as `line_samplings` wants them."""
        rows, num_lines = plan.verify_rows, self._num_lines
        numbers = verify_numbers(rows, self._shape, num_lines, self._capacity)
        copy_to(self._numbers, torch.from_numpy(numbers))
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(BatchPlan(plan.step_id, verify_rows=rows), num_lines)
        self._step.replay()
        # The next verification is planned when this one has been read: what only the draws need is made
        # while the pass runs.
        if self._step.drafts is not None:
            self._step.drafts.send(rows)
        draws = self._step.draw(line_samplings(rows, drafts, num_lines))
        pending = PendingVerify(rows, num_lines, draws, self._step.accepted_R)
        if self._step.drafts is not None:
            self._step.drafts.run(rows)
        return pending
