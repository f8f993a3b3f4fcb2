"""What drafts a runner was about to verify, step by step, for tests to compare with a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from kiln_engine.domain import BatchPlan, RowSampling
from kiln_engine.execution.runner import TorchRunner


@dataclass(frozen=True)
class Drafted:
    """Drafts of one row that wait behind the first `num_tokens` tokens of its sequence."""

    num_tokens: int
    draft_ids: list[int]
    # How each of them was to be drawn: as the token at its place.
    samplings: tuple[RowSampling, ...]


def record_drafts(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> Mapping[int, list[Drafted]]:
    """By sequence, those that the device made and a later step verified."""
    seen: dict[int, list[Drafted]] = {}
    launch = runner.launch

    def look(plan: BatchPlan) -> Any:
        for row in plan.verify_rows:
            if row.draft_token_ids is None and row.num_drafts:
                drafts = runner._draft_ids.ids_SK[row.state_slot, : row.num_drafts].tolist()
                found = Drafted(row.position + 1, drafts, row.samplings[: row.num_drafts])
                seen.setdefault(row.sequence_id, []).append(found)
        return launch(plan)

    monkeypatch.setattr(runner, "launch", look)
    return seen
