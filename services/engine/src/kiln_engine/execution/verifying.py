"""The lines of verify rows: how each is drawn, and how many of a row's drafts stand.

Legend: `R` rows, `N` lines of each (padding included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kiln_engine.domain.output_rules import Constraint
from kiln_engine.domain.plan import RowSampling, VerifyRow
from kiln_engine.domain.request import SamplingParams
from kiln_engine.domain.result import RowResult, VerifyResult
from kiln_engine.execution.host_copy import HostCopy
from kiln_engine.execution.sampler import PendingDraws

_PADDING = RowSampling(SamplingParams(temperature=0.0), output_index=0)


def needs_drafts_on_host(row: VerifyRow) -> bool:
    """Whether the draws behind the drafts depend on which they are, and only the device knows that."""
    if row.draft_token_ids is not None:
        return False
    return any(sampling.constraint or sampling.params.needs_history for sampling in row.samplings[1:])


def line_samplings(
    rows: Sequence[VerifyRow], drafts: Sequence[Sequence[int]], num_lines: int
) -> list[RowSampling]:
    """How the lines are drawn, row after row, each with the drafts before it in its history.

    A row's `drafts` may be left empty where nothing depends on them.
    """
    samplings: list[RowSampling] = []
    for row, guessed in zip(rows, drafts, strict=True):
        samplings += _with_drafts(row.samplings, guessed)
        samplings += [_PADDING] * (num_lines - row.num_lines)
    return samplings


def _with_drafts(samplings: Sequence[RowSampling], guessed: Sequence[int]) -> list[RowSampling]:
    lines = [samplings[0]]
    # The rules after the drafts so far; lines behind a draft they forbid do not stand, however drawn.
    constraint: Constraint | None = next((each.constraint for each in samplings[1:] if each.constraint), None)
    for place, sampling in enumerate(samplings[1:], 1):
        if constraint is not None:
            constraint = constraint.after(guessed[place - 1])
        if sampling.params.needs_history:
            history = sampling.output_token_ids + tuple(guessed[:place])
            sampling = replace(sampling, output_token_ids=history)
        if sampling.constraint is not None:
            sampling = replace(sampling, constraint=constraint)
        lines.append(sampling)
    return lines


class PendingVerify:
    """Verified rows on their way to the host."""

    def __init__(
        self, rows: Sequence[VerifyRow], num_lines: int, draws: PendingDraws, accepted_R: torch.Tensor
    ) -> None:
        self._rows, self._num_lines = rows, num_lines
        self._draws = draws
        # The next verification is planned when this one has been read.
        self._num_accepted = HostCopy(accepted_R[: len(rows)], is_urgent=True)

    def wait(self) -> list[VerifyResult]:
        """What each row has drawn, in order."""
        # Sent last, so that the draws are there too when it has come.
        num_accepted = self._num_accepted.wait()
        drawn, results = self._draws.wait(), []
        for index, (row, count) in enumerate(zip(self._rows, num_accepted, strict=True)):
            first = index * self._num_lines
            tokens = tuple(RowResult(row.sequence_id, *draw) for draw in drawn[first : first + count])
            results.append(VerifyResult(row.sequence_id, tokens))
        return results
