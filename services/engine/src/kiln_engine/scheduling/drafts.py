"""Which sequences guess ahead in the next step, and how far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kiln_engine.domain.plan import BatchPlan, VerifyRow
from kiln_engine.domain.speculation import Candidate, Speculator
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.memory import SequenceMemory
from kiln_engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drafts:
    """What one verify row has behind its newest token; fields as in VerifyRow."""

    num_tokens: int = 0
    token_ids: tuple[int, ...] | None = ()
    num_next: int = 0

    @property
    def is_speculative(self) -> bool:
        return bool(self.num_tokens or self.num_next)


NO_DRAFTS = Drafts()


class DraftPlanner:
    """Asks the speculator, and cuts what it wants to what there is room for.

    A step with drafts is planned when all steps before it have been committed, because its rows begin
    with tokens that are known. As soon as one sequence has drafts, all that decode are verify rows of
    the same step, the others with one line: the weights are read once for all of them.
    """

    def __init__(
        self, speculator: Speculator | None, limits: SchedulerLimits, memory: SequenceMemory
    ) -> None:
        self._speculator = speculator
        self._limits = limits
        self._memory = memory

    def lengths(self, able: Iterable[Sequence]) -> dict[int, int]:
        """The most drafts of each sequence that is to guess in the next step, by its id.

        Without a speculator nobody looks at who is `able` to decode.
        """
        if self._speculator is None:
            return {}
        decoding = list(able)
        if not decoding:
            return {}
        most = self._limits.num_most_lines // len(decoding) - 1
        if most < self._limits.max_draft_tokens:
            # Graphs have lines for one draft a row or for as many as there may be (`verify_ladder`).
            most = min(most, 1)
        if most <= 0:
            return {}
        candidates = [self._candidate(sequence, most) for sequence in decoding]
        wanted = self._speculator.lengths(candidates)
        pairs = zip(candidates, wanted, strict=True)
        lengths = {each.sequence_id: min(count, each.most_drafts) for each, count in pairs}
        return {sequence_id: length for sequence_id, length in lengths.items() if length > 0}

    def assign(self, decoding: list[Sequence], lengths: dict[int, int]) -> dict[int, Drafts]:
        """What goes as verify rows, by sequence id: everybody or, if nobody has drafts, whoever must fold.

        Takes pages for what is guessed while there are any, and cuts the drafts otherwise.
        """
        if self._speculator is None:
            return {}
        drafts = {each.sequence_id: self._drafts(each, lengths.get(each.sequence_id, 0)) for each in decoding}
        if any(each.is_speculative for each in drafts.values()):
            return drafts
        return {each.sequence_id: NO_DRAFTS for each in decoding if self._must_fold(each)}

    def observe(self, row: VerifyRow, sequence: Sequence, num_accepted: int) -> None:
        """Tell the speculator how a row's drafts went."""
        if self._speculator is not None and row.num_drafts:
            self._speculator.observe(
                sequence.sequence_id, sequence.request.adapters, row.num_drafts, num_accepted
            )

    def observe_step(self, plan: BatchPlan, seconds: float) -> None:
        """Tell the speculator how long a step took."""
        if self._speculator is not None:
            self._speculator.observe_step(plan, seconds)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if self._speculator is not None:
            self._speculator.forget(sequence.sequence_id)

    def _candidate(self, sequence: Sequence, most: int) -> Candidate:
        num_tokens = len(sequence.tokens)
        num_outputs_left = sequence.request.sampling.max_tokens - sequence.num_outputs
        # Each line draws a token, the first of them without a draft.
        num_useful = min(num_outputs_left, self._limits.max_num_tokens - num_tokens) - 1
        return Candidate(
            sequence_id=sequence.sequence_id,
            adapters=sequence.request.adapters,
            token_ids=sequence.tokens,
            num_prompt_tokens=sequence.num_prompt_tokens,
            most_drafts=max(0, min(most, self._limits.max_draft_tokens, num_useful)),
        )

    def _drafts(self, sequence: Sequence, length: int) -> Drafts:
        assert self._speculator is not None
        if length <= 0 or sequence.num_steps_under_way:
            return NO_DRAFTS
        if not self._speculator.drafts_on_device:
            num_fitting = self._take_room(sequence, length)
            token_ids = self._speculator.propose(self._candidate(sequence, num_fitting), num_fitting)
            return Drafts(len(token_ids), token_ids) if token_ids else NO_DRAFTS
        num_tokens = min(length, sequence.num_device_drafts)
        # Behind the last draft comes the token drawn there, and behind that the next drafts but one.
        num_left = self._limits.max_num_tokens - len(sequence.tokens) - num_tokens
        wanted = num_tokens + max(0, min(length, num_left))
        room = self._take_room(sequence, wanted)
        num_tokens = min(num_tokens, room)
        return Drafts(num_tokens, None if num_tokens else (), room - num_tokens)

    def _take_room(self, sequence: Sequence, num_ahead: int) -> int:
        """Places for tokens after the newest one: `num_ahead`, or fewer where pages are short."""
        memory, num_tokens = self._memory, len(sequence.tokens)
        missing = memory.num_pages_for(num_tokens + num_ahead) - len(sequence.page_ids)
        if missing > 0 and memory.add_pages(sequence, missing):
            return num_ahead
        return min(num_ahead, len(sequence.page_ids) * memory.page_tokens - num_tokens)

    def _must_fold(self, sequence: Sequence) -> bool:
        """Whether the ring holds a page that no step has committed."""
        num_in_ring = sequence.num_computed - sequence.num_state_tokens
        return not sequence.num_steps_under_way and num_in_ring >= self._memory.page_tokens
