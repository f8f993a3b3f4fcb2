"""Every request that is alive in the engine, from its arrival to its end."""

from __future__ import annotations

import bisect
import itertools

from kiln_common.errors import DuplicateRequestId, KilnError
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import FinishReason, SequenceEvent
from kiln_engine.domain.speculation import Speculator
from kiln_engine.scheduling.drafts import DraftPlanner
from kiln_engine.scheduling.intake import new_sequence
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.memory import SequenceMemory
from kiln_engine.scheduling.sequence import Sequence
from kiln_engine.scheduling.stats import SchedulerCounters
from kiln_engine.scheduling.stopping import deadline_error


class SequenceBook:
    """Who waits, who runs, and who has ended but is still in a step: the lives behind a Scheduler."""

    def __init__(
        self,
        limits: SchedulerLimits,
        eos_token_ids: frozenset[int],
        speculator: Speculator | None = None,
    ) -> None:
        self.limits = limits
        self.memory = SequenceMemory(
            num_pages=limits.num_pages,
            num_state_slots=limits.num_state_slots,
            page_tokens=limits.page_tokens,
        )
        self.counters = SchedulerCounters()
        self._eos_token_ids = eos_token_ids
        self._sequence_ids = itertools.count(1)
        self._by_request_id: dict[str, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        # Ended, with rows in steps under way.
        self._ending: dict[int, Sequence] = {}
        self._drafts = DraftPlanner(speculator, limits, self.memory)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """By priority, then arrival."""
        return sorted(self._running.values(), key=lambda sequence: sequence.rank)

    @property
    def waiting(self) -> list[Sequence]:
        """By priority, then arrival."""
        return list(self._waiting)

    @property
    def ending(self) -> list[Sequence]:
        """Sequences that have ended and hold memory until the steps under way are committed."""
        return list(self._ending.values())

    def add(self, request: GenerationRequest, adapter_slots: tuple[tuple[int, float], ...] = ()) -> None:
        """Accept a request; its adapters must be resident in `adapter_slots` until it ends.

        Raises:
            DuplicateRequestId: a request of this id is alive.
            EmptyPrompt, PromptTooLong: it could never produce a token.
            GrammarFailed: what it resumes does not follow its grammar.
        """
        if request.request_id in self._by_request_id:
            raise DuplicateRequestId(request.request_id)
        sequence = new_sequence(
            next(self._sequence_ids), request, adapter_slots, self.limits, self._eos_token_ids
        )
        self._by_request_id[request.request_id] = sequence
        self._wait(sequence)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request now; None when it is not alive. What it generated is not cached."""
        sequence = self._by_request_id.get(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return SequenceEvent(request_id, finish_reason=FinishReason.ABORT)

    def expire(self, now: float) -> list[SequenceEvent]:
        """End every request whose deadline has passed."""
        late = [
            sequence
            for sequence in self._by_request_id.values()
            if sequence.request.deadline_s is not None and sequence.request.deadline_s <= now
        ]
        return [self._fail(sequence, deadline_error(sequence, now)) for sequence in late]

    def fail_all(self, error: KilnError) -> list[SequenceEvent]:
        """End every sequence, running or waiting."""
        return [self._fail(sequence, error) for sequence in list(self._by_request_id.values())]

    def _land(self, sequence_id: int, num_computed: int = 0) -> Sequence:
        """The sequence of a row whose step has ended, `num_computed` tokens behind it if it went well."""
        sequence = self._running.get(sequence_id) or self._ending[sequence_id]
        sequence.num_steps_under_way -= 1
        sequence.num_computed = max(sequence.num_computed, num_computed)
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        if not sequence.is_redecoded:
            self.memory.keep_live_state(sequence)
        self.memory.release(sequence)
        del self._running[sequence.sequence_id]
        self._wait(sequence)
        self.counters.num_preemptions += 1

    def _wait(self, sequence: Sequence) -> None:
        sequence.is_running = False
        sequence.is_prefilling = False
        bisect.insort(self._waiting, sequence, key=lambda waiting: waiting.rank)

    def _fail(self, sequence: Sequence, error: KilnError) -> SequenceEvent:
        self._end(sequence)
        return SequenceEvent(sequence.request.request_id, finish_reason=FinishReason.ERROR, error=error)

    def _end(self, sequence: Sequence) -> None:
        self._drafts.forget(sequence)
        del self._by_request_id[sequence.request.request_id]
        if sequence.is_running:
            del self._running[sequence.sequence_id]
            sequence.is_running = False
            self._ending[sequence.sequence_id] = sequence
            self._let_go(sequence)
        else:
            self._waiting.remove(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Take back what an ended sequence holds, once no step under way has a row for it."""
        if sequence.num_steps_under_way:
            return
        if sequence.is_answer_useful and not sequence.is_redecoded:
            self.memory.keep_live_state(sequence)
        self.memory.release(sequence)
        del self._ending[sequence.sequence_id]
