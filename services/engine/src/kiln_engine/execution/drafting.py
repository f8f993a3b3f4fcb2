"""Guesses of the next tokens by the multi-token-prediction layer, made on the device behind a step's draws.

A draft is drawn as the token at its place will be: by its row's temperature and truncation and with the same
random number, so that where the layer's distribution is close to the model's it is mostly that very
token. What changes single logits of a row (penalties, bans, rules) is left out: it costs acceptance only.

Legend: `R` rows, `K` longest draft, `F` fields of a row's settings, `U` random numbers of a row, `V` tokens
a draft is chosen from, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from kiln_engine.domain.plan import BatchPlan, VerifyRow
from kiln_engine.execution.adapter_rows import StaticLoraRows
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.draws import uniform_draws
from kiln_engine.execution.sampled_ids import DraftIds
from kiln_engine.execution.sampling_tables import row_fields
from kiln_engine.model import Linears, copy_to
from kiln_engine.model.linears import BaseMatrices
from kiln_engine.model.mtp_layer import DraftPlaces, MtpLayer
from kiln_engine.model.verify_layout import VerifyLayout
from kiln_nn.kernels.draft_rows import DraftRows, VerifiedRows, end_draft_
from kiln_nn.kernels.sample import draw_tokens
from kiln_nn.kernels.sample.settings import (
    NUM_DRAWN_FIELDS,
    NUM_EDIT_FIELDS,
    NUM_ROW_FIELDS,
    PADDING,
)


def draft_numbers(rows: Sequence[VerifyRow], capacity: int, num_uniforms: int) -> np.ndarray:
    """How the rows draw, float64 `[capacity, F + U]`: their settings, then their random numbers.

    Those begin with the number of the token after the one that the first line draws.
    """
    numbers_RF = np.zeros((capacity, NUM_ROW_FIELDS + num_uniforms))
    numbers_RF[len(rows) :, :NUM_ROW_FIELDS] = PADDING
    if rows:
        numbers_RF[: len(rows), :NUM_ROW_FIELDS] = [row_fields(row.samplings[0]) for row in rows]
        seeds = [row.samplings[0].params.seed for row in rows for _ in range(num_uniforms)]
        first = [row.samplings[0].output_index + 1 for row in rows]
        places = [start + number for start in first for number in range(num_uniforms)]
        uniforms = uniform_draws(seeds, places)
        numbers_RF[: len(rows), NUM_ROW_FIELDS:] = uniforms.reshape(len(rows), num_uniforms)
    return numbers_RF


class DraftPass:
    """The drafts of up to `capacity` rows, over buffers that stay where they are.

    `send` brings what the host knows, `begin` takes up where the rows' verification has ended, and
    `run` adds the drafts, one `step` each for all rows. A graph can hold `begin`, `step` and
    `all_steps`; on a GPU nothing waits for the host. The drafts are tokens of the first `num_tokens` of
    the vocabulary (None: of all). `adapter_rows` are those behind `linears`, of the rows' adapters.
    """

    def __init__(
        self,
        layer: MtpLayer,
        linears: Linears,
        draft_ids: DraftIds,
        capacity: int,
        num_tokens: int | None,
        adapter_rows: StaticLoraRows | None = None,
    ) -> None:
        self._layer, self._linears, self._draft_ids = layer, linears, draft_ids
        self._adapter_rows = adapter_rows
        self._capacity = capacity
        self._num_tokens = num_tokens
        device = draft_ids.ids_SK.device
        # A row that verifies as many as it may has all of them before it, and as many behind.
        self._num_uniforms = 2 * draft_ids.ids_SK.shape[1]
        numbers_RF = torch.from_numpy(draft_numbers((), capacity, self._num_uniforms)).to(device)
        settings_RF = numbers_RF[:, :NUM_ROW_FIELDS].contiguous()
        self._edits_EF = settings_RF.new_empty(0, NUM_EDIT_FIELDS)
        self._drawn_RF = settings_RF.new_empty(capacity, NUM_DRAWN_FIELDS)
        slots_R = torch.full((capacity,), -1, dtype=torch.long, device=device)
        zeros = partial(torch.zeros_like, slots_R)
        self.rows = DraftRows(
            token_ids_R=zeros(),
            positions_R=zeros(),
            hidden_RD=layer.carried.last(slots_R),
            slots_R=slots_R,
            table_rows_R=zeros(),
            room_R=zeros(),
            column_R=zeros(),
            place_R=zeros(),
            settings_RF=settings_RF,
            numbers_RF=numbers_RF,
        )
        self._num_most = draft_ids.ids_SK.shape[1]
        # `step` and `all_steps`, or graphs of them.
        self.run_step: Callable[[], object] = self.step
        self.run_all_steps: Callable[[], object] = self.all_steps

    @property
    def is_captured(self) -> bool:
        return self.run_step != self.step

    def send(self, rows: Sequence[VerifyRow]) -> None:
        """Bring the settings of these rows, in the order of the verification."""
        numbers = draft_numbers(rows, self._capacity, self._num_uniforms)
        copy_to(self.rows.numbers_RF, torch.from_numpy(numbers))
        if self._adapter_rows is not None:
            self._adapter_rows.fill_(BatchPlan(0, verify_rows=tuple(rows)), num_lines=1)

    def begin(self, verify: VerifyLayout, drawn_RN: torch.Tensor, accepted_R: torch.Tensor) -> None:
        """Go on behind the tokens that the rows have drawn, of which `accepted_R` stand.

        The verification may have fewer rows than there is room for.
        """
        count = accepted_R.shape[0]
        verified = VerifiedRows(
            drawn_RN=drawn_RN,
            accepted_R=accepted_R,
            positions_T=verify.positions_T,
            table_rows_T=verify.table_rows_T,
            slots_R=verify.live_slots_R[:count],
            room_R=verify.room_R[:count],
        )
        self._layer.carried.begin_drafts(self.rows, verified)

    def run(self, rows: Sequence[VerifyRow], linears: Linears | None = None) -> None:
        """Make as many drafts as one of the rows wants; `linears` with the adapters of these rows, if given."""
        run_step = self.run_step if linears is None else partial(self.step, linears)
        num_drafts = max((row.num_next_drafts for row in rows), default=0)
        if linears is None and num_drafts == self._num_most:
            self.run_all_steps()
            return
        for _ in range(num_drafts):
            run_step()

    def all_steps(self) -> None:
        """As many drafts as there is room for, behind `begin`."""
        for _ in range(self._num_most):
            self.step()

    def step(self, linears: Linears | None = None) -> None:
        """Draw every row's next draft, and keep it for the row's next step."""
        layer, linears, rows = self._layer, linears or self._linears, self.rows
        places = DraftPlaces(rows.table_rows_R, rows.room_R)
        hidden_RD = layer.forward(rows.token_ids_R, rows.hidden_RD, rows.positions_R, places, linears)
        logits_RV = layer.logits(hidden_RD, linears, self._num_tokens)
        out = rows.token_ids_R, self._drawn_RF
        draw_tokens(logits_RV, rows.settings_RF, self._edits_EF, out=out)
        end_draft_(rows, hidden_RD, self._draft_ids.ids_SK)


class Drafter:
    """The passes of all sizes, with and without adapters."""

    def __init__(
        self,
        layer: MtpLayer,
        matrices: BaseMatrices,
        adapters: AdapterStore,
        draft_ids: DraftIds,
        num_tokens: int | None,
    ) -> None:
        self._layer, self._matrices, self._adapters = layer, matrices, adapters
        self._draft_ids, self._num_tokens = draft_ids, num_tokens
        self._passes: dict[tuple[int, bool], DraftPass] = {}

    def of(self, capacity: int, *, has_adapters: bool = False) -> DraftPass:
        """The one pass for so many rows; with adapters it holds for any that the rows use."""
        key = capacity, has_adapters
        if key not in self._passes:
            self._passes[key] = self._make(capacity, has_adapters)
        return self._passes[key]

    def _make(self, capacity: int, has_adapters: bool) -> DraftPass:
        linears, rows = self._adapters.static_linears(self._matrices, capacity, has_adapters=has_adapters)
        return DraftPass(self._layer, linears, self._draft_ids, capacity, self._num_tokens, rows)
