"""What the scheduler asks about drafts: how far each sequence guesses, by which drafts, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kiln_engine.domain.adapter import AdapterUse
from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.speculation import Candidate
from kiln_engine.speculation.acceptance import AcceptanceBook, DraftTotals, SequenceAcceptance
from kiln_engine.speculation.ngram import NgramProposer
from kiln_engine.speculation.policy import DraftPolicy
from kiln_engine.speculation.step_costs import StepCosts


@dataclass(slots=True)
class _Known:
    """What is remembered of a sequence; the drafts are those behind its first `num_tokens` tokens."""

    acceptance: SequenceAcceptance
    proposer: NgramProposer | None
    num_tokens: int = 0
    drafts: tuple[int, ...] = ()


class DraftSpeculator:
    """A speculator (see domain.speculation) with drafts from the text, or from the device.

    If it is adaptive, the lengths are those that pay; otherwise the longest there may be. Where drafts
    come from the text, a sequence whose text has none decodes plainly.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        row_sizes: Sequence[int],
        *,
        drafts_on_device: bool,
        is_adaptive: bool = True,
    ) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.drafts_on_device = drafts_on_device
        self._policy = DraftPolicy(StepCosts(row_sizes, max_draft_tokens)) if is_adaptive else None
        self._book = AcceptanceBook(max_draft_tokens)
        self._known: dict[int, _Known] = {}

    def totals(self) -> tuple[DraftTotals, ...]:
        """Drafts and how many were accepted, by the names of a request's adapters. Any thread may ask."""
        return self._book.totals()

    def lengths(self, candidates: Sequence[Candidate]) -> list[int]:
        """See Speculator."""
        for candidate in candidates:
            self._look_up(candidate)
        most = [self._most(candidate) for candidate in candidates]
        if self._policy is None:
            return most
        estimates = [
            self._known[candidate.sequence_id].acceptance.estimate if length else None
            for candidate, length in zip(candidates, most, strict=True)
        ]
        chosen = self._policy.choose(estimates, max(most, default=0))
        return [min(pair) for pair in zip(chosen, most, strict=True)]

    def propose(self, candidate: Candidate, num_tokens: int) -> tuple[int, ...]:
        """See Speculator."""
        self._look_up(candidate)
        return self._known[candidate.sequence_id].drafts[:num_tokens]

    def observe(
        self, sequence_id: int, adapters: tuple[AdapterUse, ...], drafted: int, accepted: int
    ) -> None:
        """See Speculator."""
        known = self._known.get(sequence_id)
        if known is not None:
            known.acceptance.observe(drafted, accepted)
        if self._policy is not None:
            self._policy.gain(accepted)

    def observe_step(self, plan: BatchPlan, seconds: float) -> None:
        """See Speculator."""
        if self._policy is None:
            return
        num_verified = max(plan.num_verify_lines - 1, 0)
        num_drafted = num_verified
        if self.drafts_on_device:
            num_drafted = max((row.num_next_drafts for row in plan.verify_rows), default=0)
        num_rows = len(plan.decode_rows) + len(plan.verify_rows)
        if plan.prefill_chunks:
            self._policy.pass_over()
        elif plan.verify_rows and not num_verified and not num_drafted:
            # Rows that fold before they decode plainly again.
            self._policy.pass_over(num_rows, seconds)
        else:
            self._policy.observe(num_rows, num_verified, num_drafted, seconds)

    def forget(self, sequence_id: int) -> None:
        """See Speculator."""
        self._known.pop(sequence_id, None)

    def _most(self, candidate: Candidate) -> int:
        if self.drafts_on_device:
            return candidate.most_drafts
        return min(candidate.most_drafts, len(self._known[candidate.sequence_id].drafts))

    def _look_up(self, candidate: Candidate) -> None:
        """Know the sequence, and what its text proposes behind the tokens so far."""
        known = self._known.get(candidate.sequence_id)
        if known is None:
            adapters = "+".join(use.name for use in candidate.adapters)
            proposer = None if self.drafts_on_device else NgramProposer()
            known = self._known[candidate.sequence_id] = _Known(self._book.begin(adapters), proposer)
        if known.proposer is not None and known.num_tokens != len(candidate.token_ids):
            known.num_tokens = len(candidate.token_ids)
            known.drafts = known.proposer.propose(candidate.token_ids, self.max_draft_tokens)
