"""Guessing tokens ahead: what the scheduler asks of whoever decides how far, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kiln_engine.domain.adapter import AdapterUse
from kiln_engine.domain.plan import BatchPlan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that decodes in the next step, as a speculator sees it."""

    sequence_id: int
    adapters: tuple[AdapterUse, ...]
    # Prompt and answer so far, not to be kept or changed. While a step is under way the newest is missing.
    token_ids: Sequence[int]
    num_prompt_tokens: int
    # Most drafts that can serve it: what is left of its length, and what a step has room for.
    most_drafts: int


# Rows with as many lines as there may be that a step has room for, however few sequences may run.
_LEAST_ROWS = 16


def most_lines(max_running: int, max_draft_tokens: int) -> int:
    """Lines of verify rows in one step, at the most; as many as sequences may run, without speculation."""
    return max(max_running, _LEAST_ROWS * (1 + max_draft_tokens)) if max_draft_tokens else max_running


class Speculator(Protocol):
    """Decides how far each sequence guesses ahead. Called from the loop thread only."""

    # The longest draft, and whether drafts are made on the device, by the step before.
    max_draft_tokens: int
    drafts_on_device: bool

    def lengths(self, candidates: Sequence[Candidate]) -> list[int]:
        """For each sequence that decodes now, together, the drafts wanted in its step; 0 to `most_drafts`.

        With 0 it decodes plainly and a step ahead; otherwise it waits until its newest token is known.
        """
        ...

    def propose(self, candidate: Candidate, num_tokens: int) -> tuple[int, ...]:
        """At most so many guesses of the tokens after `candidate.token_ids`. Not asked of a device."""
        ...

    def observe(
        self, sequence_id: int, adapters: tuple[AdapterUse, ...], drafted: int, accepted: int
    ) -> None:
        """Hear how many of the drafts of one row were accepted."""
        ...

    def observe_step(self, plan: BatchPlan, seconds: float) -> None:
        """Hear how long a step took, behind the one before it."""
        ...

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        ...
