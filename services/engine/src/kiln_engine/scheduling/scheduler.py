"""Decides what each step computes: continuous batching over both pools and the prefix tree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from kiln_common.errors import KilnError
from kiln_engine.domain.adapter import AdapterChange
from kiln_engine.domain.errors import NonFiniteLogits
from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk, VerifyRow
from kiln_engine.domain.result import (
    FinishReason,
    ReadoutResult,
    RowResult,
    SequenceEvent,
    StepResult,
    VerifyResult,
)
from kiln_engine.domain.speculation import Speculator
from kiln_engine.scheduling.admission import branch_points, is_about_to_hit, want_checkpoints
from kiln_engine.scheduling.book import SequenceBook
from kiln_engine.scheduling.checkpoints import is_turn_end_useful
from kiln_engine.scheduling.drafts import Drafts
from kiln_engine.scheduling.events import with_beginning
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.moving import move
from kiln_engine.scheduling.rows import can_decode, decode_row, prefill_chunk, verify_row
from kiln_engine.scheduling.sequence import Sequence
from kiln_engine.scheduling.stats import SchedulerStats, scheduler_stats
from kiln_engine.scheduling.stopping import why_ended


class Scheduler(SequenceBook):
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
    of their plans. With a speculator, sequences may guess ahead; while one does, steps are planned one
    by one.

    Not safe for threads: the engine's loop is its only caller. `eos_token_ids` end a completion
    unless its request ignores them.

    Paper: Yu et al. 2022, Orca (iteration-level scheduling); Agrawal et al. 2023, Sarathi
    (arXiv 2308.16369, chunked prefill mixed with decode).
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        eos_token_ids: frozenset[int],
        speculator: Speculator | None = None,
    ) -> None:
        super().__init__(limits, eos_token_ids, speculator)
        self._step_ids = itertools.count(1)
        # Plans that are not committed yet, and those among them with verify rows.
        self._num_under_way = 0
        self._num_verifying = 0

    def plan(self, now: float) -> BatchPlan:
        """Decide the next step.

        Takes pages and slots for it, preempts if needed, and starts waiting sequences. Empty when
        there is no work, or none until the steps under way are committed.
        """
        num_preemptions = self.counters.num_preemptions
        lengths = self._drafts.lengths(self._able_to_decode())
        must_wait = self._num_verifying or (lengths and self._num_under_way)
        decoding = None if must_wait else self._make_room()
        if decoding is None:
            return BatchPlan(next(self._step_ids))
        drafts = self._drafts.assign(decoding, lengths)
        verify_rows: list[VerifyRow] = []
        if drafts:
            verifying = [each for each in decoding if each.sequence_id in drafts]
            decoding = [each for each in decoding if each.sequence_id not in drafts]
            verify_rows = [self._plan_verify(each, drafts[each.sequence_id]) for each in verifying]
        decode_rows = [self._plan_decode(each) for each in decoding]
        budget = self.limits.step_token_budget - len(decode_rows)
        budget -= sum(row.num_lines for row in verify_rows)
        chunks: list[PrefillChunk] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget = self._plan_chunk(sequence, budget, chunks)
        if self.counters.num_preemptions == num_preemptions:
            self._plan_admissions(budget, chunks, now)
        plan = BatchPlan(next(self._step_ids), tuple(decode_rows), tuple(chunks), tuple(verify_rows))
        self._count_under_way(plan, 1)
        return plan

    def _able_to_decode(self) -> Iterator[Sequence]:
        """In order; nothing is put in order where nobody asks."""
        yield from (sequence for sequence in self.running if self._can_decode(sequence))

    def commit(self, plan: BatchPlan, result: StepResult) -> list[SequenceEvent]:
        """Take over what the step computed; one event for each token drawn and each chunk read out.

        Rows of sequences that ended since the plan are ignored.
        """
        assert result.step_id == plan.step_id
        self._count_under_way(plan, -1)
        drawn = {row.sequence_id: row for row in result.rows}
        read_out = {readout.sequence_id: readout for readout in result.readouts}
        events: list[SequenceEvent] = []
        for decode in plan.decode_rows:
            row = drawn[decode.sequence_id]
            sequence = self._land(decode.sequence_id, num_computed=decode.position + 1)
            if decode.state_commit_slot is not None:
                sequence.num_state_tokens = decode.position + 1
            if sequence.is_running:
                # What is decoded again draws a token that is known.
                if decode.position + 1 == len(sequence.tokens):
                    events.append(self._append(sequence, row))
            else:
                # It computed its last token, and nobody will look at what was drawn after it.
                sequence.is_answer_useful &= math.isfinite(row.logprob)
                self._let_go(sequence)
        for chunk in plan.prefill_chunks:
            end = chunk.start + len(chunk.token_ids)
            sequence = self._land(chunk.sequence_id, num_computed=end)
            sequence.num_state_tokens = end // self.limits.page_tokens * self.limits.page_tokens
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
        for verify, verified in zip(plan.verify_rows, result.verified, strict=True):
            events += self._take_verified(verify, verified)
        self.counters.num_steps += 1
        return events

    def fail(self, plan: BatchPlan, error: KilnError) -> list[SequenceEvent]:
        """End every sequence of a plan that could not be carried out."""
        self._count_under_way(plan, -1)
        events = []
        for sequence_id in plan.sequence_ids:
            sequence = self._land(sequence_id)
            if sequence.is_running:
                events.append(self._fail(sequence, error))
            else:
                sequence.is_answer_useful = False
                self._let_go(sequence)
        return events

    def observe_step(self, plan: BatchPlan, seconds: float) -> None:
        """Hear how long a step took, what it spent behind the one before not counted."""
        self._drafts.observe_step(plan, seconds)

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
            if not sequence.is_running or not self._can_decode(sequence):
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

    def _can_decode(self, sequence: Sequence) -> bool:
        return can_decode(sequence, self.limits.max_num_tokens)

    def _count_under_way(self, plan: BatchPlan, change: int) -> None:
        self._num_under_way += 0 if plan.is_empty else change
        self._num_verifying += change if plan.verify_rows else 0

    def _plan_verify(self, sequence: Sequence, drafts: Drafts) -> VerifyRow:
        row = verify_row(sequence, drafts, self.limits.page_tokens, self._eos_token_ids)
        # As far as is certain: the newest token.
        sequence.num_planned += 1
        sequence.num_steps_under_way += 1
        return row

    def _plan_decode(self, sequence: Sequence) -> DecodeRow:
        row = decode_row(sequence, self.limits.page_tokens, self._eos_token_ids)
        sequence.num_planned += 1
        sequence.num_steps_under_way += 1
        sequence.num_device_drafts = 0
        return row

    def _plan_chunk(self, sequence: Sequence, budget: int, chunks: list[PrefillChunk]) -> int:
        """Append the sequence's next chunk if the budget holds one; returns the budget left."""
        num_left = sequence.num_prefill_tokens - sequence.num_planned
        num_tokens = self.limits.chunk_length(sequence.num_planned, num_left, budget)
        if num_tokens == 0:
            return budget
        self.memory.take_checkpoints(sequence, sequence.num_planned + num_tokens)
        chunks.append(prefill_chunk(sequence, num_tokens, self.limits.page_tokens, self._eos_token_ids))
        sequence.num_planned += num_tokens
        sequence.num_steps_under_way += 1
        sequence.is_prefilling = num_tokens < num_left
        return budget - num_tokens

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
        if sequence.request.uses_prefix_cache and not sequence.has_moved:
            branches = branch_points(sequence, num_matched, self._waiting, self.limits.page_tokens)
            want_checkpoints(sequence, branches, self.limits)
        self.counters.num_tokens_lost_for_want_of_checkpoint += num_matched - num_hit
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_hit, sequence.num_prompt_tokens)
            sequence.first_scheduled_s = now
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_tokens += sequence.num_cached_tokens
        return True

    def _take_verified(self, verify: VerifyRow, verified: VerifyResult) -> list[SequenceEvent]:
        """The tokens of a row up to the one that ends its request."""
        assert verified.sequence_id == verify.sequence_id
        sequence = self._land(verify.sequence_id)
        if verify.state_fold_slot is not None:
            sequence.num_state_tokens += self.limits.page_tokens
        self._drafts.observe(verify, sequence, len(verified.rows) - 1)
        sequence.num_device_drafts = verify.num_next_drafts
        events = []
        for num_lines, row in enumerate(verified.rows, 1):
            if sequence.is_running:
                sequence.num_computed = sequence.num_planned = verify.position + num_lines
                events.append(self._append(sequence, row))
        if not sequence.is_running and sequence.sequence_id in self._ending:
            self._let_go(sequence)
        return events

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
