"""Decides what each step computes: continuous batching over both pools and the prefix tree."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import replace

from kiln_common.errors import DuplicateRequestId, KilnError, PromptTooLong
from kiln_engine.domain.adapter import AdapterChange
from kiln_engine.domain.errors import EmptyPrompt, NonFiniteLogits
from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk, StateCheckpoint
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import FinishReason, ReadoutResult, RowResult, SequenceEvent, StepResult
from kiln_engine.scheduling.admission import branch_points, is_about_to_hit
from kiln_engine.scheduling.checkpoints import is_turn_end_useful, plan_checkpoints
from kiln_engine.scheduling.events import with_beginning
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.memory import SequenceMemory
from kiln_engine.scheduling.moving import move
from kiln_engine.scheduling.output_constraint import start_constraint
from kiln_engine.scheduling.prefix_tree import Namespace
from kiln_engine.scheduling.rows import can_decode, decode_row, prefill_chunk
from kiln_engine.scheduling.sequence import Sequence, hash_pages
from kiln_engine.scheduling.stats import SchedulerCounters, SchedulerStats, scheduler_stats
from kiln_engine.scheduling.stopping import deadline_error, stop_ids, why_ended


class Scheduler:
    """Owns every sequence from `add` to its last event.

    A step is `plan(now)`, carried out by a runner, then `commit(plan, result)` (or `fail`). Running
    sequences that have their prompt behind them decode one token each; what is left of the token
    budget goes to prompts in chunks, running ones first, then waiting ones, by priority and arrival.
    When pages run out, the last in that order gives way: its pages go to the prefix tree, it waits,
    and later computes again what was evicted meanwhile (all of its answer, where chunks are fixed).

    The next step may be planned while one is under way, which takes every sequence in it to go on.
    One that is known to end there, or whose next draw depends on the token drawn there, sits out.
    One that turns out to have ended has computed a token in vain: its row is ignored, and what it
    holds is let go when no step under way has a row for it any more. Steps are committed in the order
    of their plans.

    Not safe for threads: the engine's loop is its only caller. `eos_token_ids` end a completion
    unless its request ignores them.

    Paper: Yu et al. 2022, Orca (iteration-level scheduling); Agrawal et al. 2023, Sarathi
    (arXiv 2308.16369, chunked prefill mixed with decode).
    """

    def __init__(self, limits: SchedulerLimits, eos_token_ids: frozenset[int]) -> None:
        self.limits = limits
        self.memory = SequenceMemory(
            num_pages=limits.num_pages,
            num_state_slots=limits.num_state_slots,
            page_tokens=limits.page_tokens,
        )
        self.counters = SchedulerCounters()
        self._eos_token_ids = eos_token_ids
        self._sequence_ids = itertools.count(1)
        self._step_ids = itertools.count(1)
        self._by_request_id: dict[str, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        # Ended, with rows in steps under way.
        self._ending: dict[int, Sequence] = {}

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
        if not request.prompt_token_ids:
            raise EmptyPrompt("the prompt has no tokens")
        if request.num_known_tokens >= self.limits.max_num_tokens:
            raise PromptTooLong(request.num_known_tokens, self.limits.max_num_tokens - 1)
        namespace = Namespace(request.adapters, request.cache_salt)
        cacheable = request.prompt_token_ids if request.uses_prefix_cache else ()
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=request,
            adapter_slots=adapter_slots,
            namespace=namespace,
            page_hashes=hash_pages(namespace, cacheable, self.limits.page_tokens),
            tokens=list(request.known_token_ids),
            is_redecoded=self.limits.fixed_chunk_tokens > 0,
            constraint=start_constraint(request, stop_ids(request.sampling, self._eos_token_ids)),
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

    def plan(self, now: float) -> BatchPlan:
        """Decide the next step.

        Takes pages and slots for it, preempts if needed, and starts waiting sequences. Empty when
        there is no work, or none until the steps under way are committed.
        """
        num_preemptions = self.counters.num_preemptions
        decoding = self._make_room()
        if decoding is None:
            return BatchPlan(next(self._step_ids))
        decode_rows = [self._plan_decode(sequence) for sequence in decoding]
        budget = self.limits.step_token_budget - len(decode_rows)
        chunks: list[PrefillChunk] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget = self._plan_chunk(sequence, budget, chunks)
        if self.counters.num_preemptions == num_preemptions:
            self._plan_admissions(budget, chunks, now)
        return BatchPlan(next(self._step_ids), tuple(decode_rows), tuple(chunks))

    def commit(self, plan: BatchPlan, result: StepResult) -> list[SequenceEvent]:
        """Take over what the step computed; one event for each token drawn and each chunk read out.

        Rows of sequences that ended since the plan are ignored.
        """
        assert result.step_id == plan.step_id
        drawn = {row.sequence_id: row for row in result.rows}
        read_out = {readout.sequence_id: readout for readout in result.readouts}
        events: list[SequenceEvent] = []
        for decode in plan.decode_rows:
            row = drawn[decode.sequence_id]
            sequence = self._land(decode.sequence_id, num_computed=decode.position + 1)
            if sequence.is_running:
                # What is decoded again draws a token that is known.
                if decode.position + 1 == len(sequence.tokens):
                    events.append(self._append(sequence, row))
            else:
                # It computed its last token, and nobody will look at what was drawn after it.
                sequence.is_answer_useful &= math.isfinite(row.logprob)
                self._let_go(sequence)
        for chunk in plan.prefill_chunks:
            sequence = self._land(chunk.sequence_id, num_computed=chunk.start + len(chunk.token_ids))
            if not sequence.is_running:
                self._let_go(sequence)
                continue
            self.memory.keep_computed(sequence, self.limits.whole_units(sequence.num_prompt_tokens))
            self.memory.keep_checkpoints(sequence)
            self.memory.release_read_slot(sequence)
            if chunk.readout is not None:
                events.append(self._take_readout(sequence, read_out[chunk.sequence_id]))
            is_next = sequence.is_running and sequence.num_computed == len(sequence.tokens)
            if chunk.sampling is not None and is_next:
                events.append(self._append(sequence, drawn[chunk.sequence_id]))
        self.counters.num_steps += 1
        return events

    def fail(self, plan: BatchPlan, error: KilnError) -> list[SequenceEvent]:
        """End every sequence of a plan that could not be carried out."""
        events = []
        for sequence_id in plan.sequence_ids:
            sequence = self._land(sequence_id)
            if sequence.is_running:
                events.append(self._fail(sequence, error))
            else:
                sequence.is_answer_useful = False
                self._let_go(sequence)
        return events

    def fail_all(self, error: KilnError) -> list[SequenceEvent]:
        """End every sequence, running or waiting."""
        return [self._fail(sequence, error) for sequence in list(self._by_request_id.values())]

    def retire_adapter(self, sha256: str) -> None:
        """Let go of what was cached with an adapter before anything else."""
        self.memory.tree.retire(sha256)

    def move(self, request_id: str, change: AdapterChange) -> bool:
        """Let a request go on with other adapters, resident like those before; False when it has ended.

        No step may be under way.
        """
        sequence = self._by_request_id.get(request_id)
        if sequence is not None:
            move(sequence, change, self.limits.page_tokens)
        return sequence is not None

    def stats(self) -> SchedulerStats:
        return scheduler_stats(
            self.memory, self.counters, num_running=len(self._running), num_waiting=len(self._waiting)
        )

    def _make_room(self) -> list[Sequence] | None:
        """The sequences that decode now, each with a page for its token.

        None when somebody has to give way for it whose row is under way: there is no room before
        that step is committed.
        """
        decoding = []
        for sequence in self.running:
            if not sequence.is_running or not can_decode(sequence, self.limits.max_num_tokens):
                continue
            # One that is decoded again has them all.
            count = max(0, self.memory.num_pages_for(sequence.num_planned + 1) - len(sequence.page_ids))
            while count and sequence.is_running and not self.memory.add_pages(sequence, count):
                last = self.running[-1]
                if last.num_steps_under_way:
                    return None
                self._preempt(last)
            if sequence.is_running:
                decoding.append(sequence)
        return decoding

    def _plan_decode(self, sequence: Sequence) -> DecodeRow:
        row = decode_row(sequence, self.limits.page_tokens, self._eos_token_ids)
        sequence.num_planned += 1
        sequence.num_steps_under_way += 1
        return row

    def _plan_chunk(self, sequence: Sequence, budget: int, chunks: list[PrefillChunk]) -> int:
        """Append the sequence's next chunk if the budget holds one; returns the budget left."""
        num_left = sequence.num_prefill_tokens - sequence.num_planned
        num_tokens = self.limits.chunk_length(sequence.num_planned, num_left, budget)
        if num_tokens == 0:
            return budget
        self._take_checkpoints(sequence, sequence.num_planned + num_tokens)
        chunks.append(prefill_chunk(sequence, num_tokens, self.limits.page_tokens, self._eos_token_ids))
        sequence.num_planned += num_tokens
        sequence.num_steps_under_way += 1
        sequence.is_prefilling = num_tokens < num_left
        return budget - num_tokens

    def _take_checkpoints(self, sequence: Sequence, end: int) -> None:
        """Reserve slots for the checkpoints up to `end`, as far as there are any."""
        taken = []
        for boundaries, may_evict in (
            (sequence.wanted_checkpoints, True),
            (sequence.optional_checkpoints, False),
        ):
            while boundaries and boundaries[0] <= end:
                boundary = boundaries.pop(0)
                slot = self.memory.take_slot(may_evict=may_evict)
                if slot is not None:
                    taken.append(StateCheckpoint(boundary, slot))
        taken.sort(key=lambda checkpoint: checkpoint.num_tokens)
        sequence.pending_checkpoints += tuple(taken)

    def _plan_admissions(self, budget: int, chunks: list[PrefillChunk], now: float) -> None:
        """Start waiting sequences in order, until one does not fit."""
        for sequence in list(self._waiting):
            is_full = len(self._running) >= self.limits.num_most_running
            if is_full or budget < min(self.limits.cache_unit_tokens, sequence.num_prefill_tokens):
                return
            if is_about_to_hit(sequence, self._running.values(), self.memory):
                continue
            if not self._start(sequence, now):
                return
            budget = self._plan_chunk(sequence, budget, chunks)

    def _start(self, sequence: Sequence, now: float) -> bool:
        num_matched = self.memory.start(sequence, num_spare_pages=len(self._running))
        if num_matched is None:
            return False
        self._waiting.remove(sequence)
        self._running[sequence.sequence_id] = sequence
        sequence.is_running = True
        sequence.is_prefilling = True
        num_hit = sequence.num_computed
        request = sequence.request
        branches = branch_points(sequence, num_matched, self._waiting, self.limits.page_tokens)
        checkpoints = plan_checkpoints(
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_stable_tokens=request.num_stable_prefix_tokens,
            num_shared_tokens=request.num_shared_prefix_tokens,
            num_hit_tokens=num_hit,
            branch_points=tuple(map(self.limits.whole_units, branches)),
            page_tokens=self.limits.cache_unit_tokens,
            interval_tokens=self.limits.checkpoint_interval_tokens,
        )
        if request.uses_prefix_cache and not sequence.has_moved:
            sequence.wanted_checkpoints = list(checkpoints.wanted)
            sequence.optional_checkpoints = list(checkpoints.optional)
        self.counters.num_tokens_lost_for_want_of_checkpoint += num_matched - num_hit
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_hit, sequence.num_prompt_tokens)
            sequence.first_scheduled_s = now
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_tokens += sequence.num_cached_tokens
        return True

    def _land(self, sequence_id: int, num_computed: int = 0) -> Sequence:
        """The sequence of a row whose step has ended, `num_computed` tokens behind it if it went well."""
        sequence = self._running.get(sequence_id) or self._ending[sequence_id]
        sequence.num_steps_under_way -= 1
        sequence.num_computed = max(sequence.num_computed, num_computed)
        return sequence

    def _append(self, sequence: Sequence, row: RowResult) -> SequenceEvent:
        if not math.isfinite(row.logprob):
            return self._fail(sequence, NonFiniteLogits(len(sequence.tokens)))
        if sequence.constraint is not None:
            try:
                sequence.constraint.advance(row.token_id)
            except KilnError as error:
                return self._fail(sequence, error)
        is_first = len(sequence.tokens) == sequence.request.num_known_tokens
        sequence.tokens.append(row.token_id)
        self.counters.num_generated_tokens += 1
        request = sequence.request
        reason = why_ended(sequence, self._eos_token_ids, self.limits.max_num_tokens)
        if reason is not None:
            sequence.is_answer_useful = is_turn_end_useful(
                sequence.num_prompt_tokens, request.num_stable_prefix_tokens
            )
            self._end(sequence)
        event = SequenceEvent(request.request_id, row, reason, moved_to=sequence.moved_to)
        sequence.moved_to = ()
        return with_beginning(event, sequence) if is_first else event

    def _take_readout(self, sequence: Sequence, readout: ReadoutResult) -> SequenceEvent:
        """What a chunk told; the end, where nothing is drawn after the prompt."""
        if not readout.is_finite:
            return self._fail(sequence, NonFiniteLogits(sequence.num_computed))
        sequence.num_read_out = max(sequence.num_read_out, sequence.num_computed)
        request = sequence.request
        event = SequenceEvent(
            request.request_id, readout=readout, packs_readout=request.packs_prompt_logprobs
        )
        if request.sampling.max_tokens or sequence.num_computed < sequence.num_prompt_tokens:
            return event
        self._end(sequence)
        return with_beginning(replace(event, finish_reason=FinishReason.LENGTH), sequence)

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
