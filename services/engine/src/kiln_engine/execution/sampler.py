"""From logits to tokens and log-probabilities, every row by its own rules.

Order: what a row's rules forbid, bias, penalties and bans, temperature, top-k, top-p, min-p, then one
uniform number of the row's own through the inverse distribution function. The work itself is
`kiln_nn.kernels.sample`.

Legend: `R` rows, `V` vocabulary, `F` fields, `M` rows with rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kiln_engine.domain.plan import RowSampling
from kiln_engine.execution.host_copy import HostCopy
from kiln_engine.execution.logit_edits import logit_edits, most_logit_edits
from kiln_engine.execution.sampling_tables import SamplingTables, StaticTables, exact_tables
from kiln_engine.execution.token_masks import token_masks
from kiln_engine.model import to_device
from kiln_nn.kernels.sample import draw_tokens
from kiln_nn.kernels.sample.settings import LOGPROB, NUM_DRAWN_FIELDS

# Room for edits in a graph. Rows that name more go around the graph.
MAX_EDITS = 8192


class DrawnRow(NamedTuple):
    """One row's token; log-probabilities as in RowResult. NaN logits give a NaN `logprob`."""

    token_id: int
    logprob: float
    sampled_logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class PendingDraws:
    """Drawn rows on their way to the host, in one copy; `token_ids_R` stay on the device."""

    def __init__(self, token_ids_R: torch.Tensor, packed: torch.Tensor, rows: Sequence[RowSampling]) -> None:
        self.token_ids_R = token_ids_R
        self._num_top = [row.params.num_top_logprobs for row in rows]
        self._packed = HostCopy(packed)

    def wait(self) -> list[DrawnRow]:
        """The rows, in order."""
        packed = self._packed.wait()
        if not any(self._num_top):
            return [DrawnRow(int(token), logprob, sampled, ()) for token, logprob, sampled, *_ in packed]
        drawn = []
        for num_top, (token, logprob, sampled, *top) in zip(self._num_top, packed, strict=True):
            ids, logprobs = top[: len(top) // 2], top[len(top) // 2 :]
            pairs = tuple((int(i), p) for i, p in zip(ids[:num_top], logprobs[:num_top], strict=True))
            drawn.append(DrawnRow(int(token), logprob, sampled, pairs))
        return drawn


class Sampler:
    """Draws the rows of a step in a form that a CUDA graph can hold.

    `prepare` sends the rows' settings, `launch` draws, `pending` sends the results: all of it into
    the current stream, one step after the other, at fixed places on the device. Only `launch` goes
    into the graph. On a CPU the same calls do the work at once.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        max_edits: int = MAX_EDITS,
        *,
        is_batch_invariant: bool = False,
    ) -> None:
        self.is_batch_invariant = is_batch_invariant
        self.max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._max_edits = max_edits
        self._tables = StaticTables(max_rows, max_edits, device)
        self._token_ids_R = torch.zeros(max_rows, dtype=torch.long, device=device)
        self._drawn_RF = torch.zeros(max_rows, NUM_DRAWN_FIELDS, dtype=torch.float64, device=device)

    def needs_eager(self, rows: Sequence[RowSampling]) -> bool:
        """Whether a graph has no room for what these rows ask for.

        That is too many edits, top log-probabilities, or rules about what may be drawn.

        Such a step goes through `sample`, which draws the same tokens.
        """
        if len(rows) > self.max_rows:
            return True
        if any(row.params.num_top_logprobs or row.constraint is not None for row in rows):
            return True
        if sum(map(most_logit_edits, rows)) <= self._max_edits:
            return False
        return sum(len(logit_edits(row)) for row in rows) > self._max_edits

    def prepare(self, rows: Sequence[RowSampling], capacity: int | None = None) -> SamplingTables:
        """Send the settings of these rows, padded to the `capacity` of a graph.

        Padding rows take the best token. A step's settings must be sent after the launch of the step
        before, and hold until the next are sent.
        """
        return self._tables.put(rows, len(rows) if capacity is None else capacity)

    def launch(self, logits_RV: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
        """Draw one token per row of `tables` from float32 logits `[R, V]`, which come back unchanged.

        Returns: token ids int64 `[R]`, at a fixed place that the next launch overwrites.
        """
        num_rows = tables.rows_RF.shape[0]
        assert logits_RV.shape[1] == self._vocab_size
        token_ids_R = self._token_ids_R[:num_rows]
        out = (token_ids_R, self._drawn_RF[:num_rows])
        is_invariant = self.is_batch_invariant
        draw_tokens(logits_RV, tables.rows_RF, tables.edits_EF, out=out, is_batch_invariant=is_invariant)
        return token_ids_R

    def pending(self, rows: Sequence[RowSampling]) -> PendingDraws:
        """The results of the last launch for its first rows, on their way to the host."""
        return PendingDraws(self._token_ids_R[: len(rows)], self._drawn_RF[: len(rows)], rows)


def sample(
    logits_RV: torch.Tensor, rows: Sequence[RowSampling], *, is_batch_invariant: bool = False
) -> PendingDraws:
    """Draw one token per row from float32 logits, whatever the rows ask for.

    Where a row's rules forbid tokens, their logits are -inf afterwards; the others are not changed.
    """
    tables = exact_tables(rows, logits_RV.device)
    top = None
    if any(row.params.num_top_logprobs for row in rows):
        top = (_top_logprobs_by_row if is_batch_invariant else _top_logprobs)(logits_RV, rows)
    masks = token_masks(rows, logits_RV.shape[1], logits_RV.device)
    log_totals_M = None if masks is None else masks.apply_(logits_RV)
    token_ids_R, drawn_RF = draw_tokens(
        logits_RV, tables.rows_RF, tables.edits_EF, is_batch_invariant=is_batch_invariant
    )
    if masks is not None and log_totals_M is not None:
        # At temperature 1 nothing is forbidden.
        drawn_M = logits_RV[masks.rows_M, token_ids_R[masks.rows_M]]
        drawn_RF[masks.rows_M, LOGPROB] = (drawn_M - log_totals_M).double()
    if top is not None:
        drawn_RF = torch.cat([drawn_RF, top], dim=1)
    return PendingDraws(token_ids_R, drawn_RF, rows)


def _top_logprobs_by_row(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """The same, each row by itself: torch cuts its sums by the number of rows."""
    most = min(max(row.params.num_top_logprobs for row in rows), logits_RV.shape[1])
    columns = torch.zeros(len(rows), 2, most, dtype=torch.float64, device=logits_RV.device)
    for i, row in enumerate(rows):
        if row.params.num_top_logprobs:
            own = _top_logprobs(logits_RV[i : i + 1], [row]).view(2, -1)
            columns[i, :, : own.shape[1]] = own
    return columns.view(len(rows), 2 * most)


def _top_logprobs(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Ids, then log-probabilities, of the most likely tokens, `[R, 2 · most wanted]`; unwanted ones are 0."""
    wanting = [i for i, row in enumerate(rows) if row.params.num_top_logprobs]
    most = min(max(row.params.num_top_logprobs for row in rows), logits_RV.shape[1])
    index = to_device(wanting, logits_RV.device)
    wanted = logits_RV.index_select(0, index)
    values, ids = wanted.topk(most, dim=-1)
    columns = torch.zeros(len(rows), 2, most, dtype=torch.float64, device=logits_RV.device)
    columns[index, 0] = ids.double()
    columns[index, 1] = (values - wanted.logsumexp(dim=-1, keepdim=True)).double()
    return columns.view(len(rows), 2 * most)
