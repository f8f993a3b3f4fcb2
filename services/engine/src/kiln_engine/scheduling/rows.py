"""What the runner needs to know about a sequence in one step."""

from __future__ import annotations

from kiln_engine.domain.plan import DecodeRow, PrefillChunk, Readout, RowSampling, VerifyRow
from kiln_engine.scheduling.drafts import Drafts
from kiln_engine.scheduling.sequence import Sequence
from kiln_engine.scheduling.stopping import banned_ids, is_at_length


def can_decode(sequence: Sequence, max_num_tokens: int) -> bool:
    """Whether a running sequence decodes in the next step.

    While its newest token is being drawn, all that is known is that there will be one: the sequence
    goes on unless that one is the last by length, or the next draw depends on which one it is.
    """
    if sequence.is_prefilling:
        return False
    if sequence.is_next_token_known:
        return True
    params = sequence.request.sampling
    is_last = is_at_length(params, sequence.num_outputs + 1, len(sequence.tokens) + 1, max_num_tokens)
    is_one_ahead = sequence.num_planned == len(sequence.tokens)
    return is_one_ahead and not is_last and not params.needs_history


def decode_row(sequence: Sequence, page_tokens: int, eos_token_ids: frozenset[int]) -> DecodeRow:
    """The row after what is planned: it feeds the next token, or the one that is being drawn.

    Its page must be there already.
    """
    assert sequence.state_slot is not None
    position = sequence.num_planned
    assert sequence.is_redecoded or position >= len(sequence.tokens) - 1
    assert position <= len(sequence.tokens)
    assert sequence.num_steps_under_way or position - sequence.num_state_tokens < page_tokens
    completes_page = (position + 1) % page_tokens == 0
    return DecodeRow(
        sequence_id=sequence.sequence_id,
        token_id=sequence.tokens[position] if sequence.is_next_token_known else None,
        position=position,
        page_ids=tuple(sequence.page_ids),
        state_read_slot=sequence.state_slot,
        state_slot=sequence.state_slot,
        state_commit_slot=sequence.state_slot if completes_page else None,
        adapter_slots=sequence.adapter_slots,
        sampling=row_sampling(sequence, position + 1, eos_token_ids),
    )


def verify_row(
    sequence: Sequence, drafts: Drafts, page_tokens: int, eos_token_ids: frozenset[int]
) -> VerifyRow:
    """The row of the newest token and its drafts; its pages must be there already."""
    assert sequence.state_slot is not None
    assert not sequence.num_steps_under_way
    position = sequence.num_computed
    assert position == len(sequence.tokens) - 1
    is_folded = position - sequence.num_state_tokens >= page_tokens
    samplings = _line_samplings(sequence, position + 1, 1 + drafts.num_tokens, eos_token_ids)
    return VerifyRow(
        sequence_id=sequence.sequence_id,
        token_id=sequence.tokens[position],
        draft_token_ids=drafts.token_ids,
        num_drafts=drafts.num_tokens,
        position=position,
        page_ids=tuple(sequence.page_ids),
        state_read_slot=sequence.state_slot,
        state_slot=sequence.state_slot,
        state_fold_slot=sequence.state_slot if is_folded else None,
        adapter_slots=sequence.adapter_slots,
        samplings=samplings,
        num_next_drafts=drafts.num_next,
    )


def prefill_chunk(
    sequence: Sequence, num_tokens: int, page_tokens: int, eos_token_ids: frozenset[int]
) -> PrefillChunk:
    """The chunk that computes the next `num_tokens` tokens, with the checkpoints taken for it."""
    assert sequence.state_slot is not None
    start = sequence.num_planned
    end = start + num_tokens
    is_last = end == sequence.num_prefill_tokens
    draws = sequence.request.sampling.max_tokens > 0
    # The checkpoint that was hit serves the first chunk; the others go on from where it ends.
    is_hit = sequence.read_slot is not None and sequence.num_steps_under_way == 0
    own_state = sequence.state_slot if start > 0 else None
    return PrefillChunk(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.tokens[start:end]),
        start=start,
        page_ids=tuple(sequence.page_ids[: -(-end // page_tokens)]),
        state_read_slot=sequence.read_slot if is_hit else own_state,
        state_slot=sequence.state_slot,
        checkpoints=tuple(c for c in sequence.pending_checkpoints if c.num_tokens > start),
        adapter_slots=sequence.adapter_slots,
        sampling=row_sampling(sequence, end, eos_token_ids) if is_last and draws else None,
        readout=_readout(sequence, start, end),
    )


def _readout(sequence: Sequence, start: int, end: int) -> Readout | None:
    """What the chunk of these tokens tells; what one before a preemption told is not told again."""
    request = sequence.request
    if request.uses_prefix_cache:
        return None
    first = max(start, sequence.num_read_out, request.first_prompt_logprob - 1)
    wants_logprobs = request.num_prompt_logprobs is not None
    return Readout(
        first=first - start,
        target_ids=request.prompt_token_ids[first + 1 : end + 1] if wants_logprobs else (),
        num_top_logprobs=request.num_prompt_logprobs or 0,
        wants_embedding=request.wants_embedding and end == sequence.num_prompt_tokens,
    )


def _line_samplings(
    sequence: Sequence, num_tokens: int, num_lines: int, eos_token_ids: frozenset[int]
) -> tuple[RowSampling, ...]:
    """How the tokens from the one after the first `num_tokens` on are drawn, a line each."""
    first = row_sampling(sequence, num_tokens, eos_token_ids)
    params, index = first.params, first.output_index
    if sequence.constraint is None and not first.banned_token_ids and not params.needs_history:
        # Nothing but the index changes from line to line; the device waits for this.
        return first, *[RowSampling(params, index + line) for line in range(1, num_lines)]
    others = [row_sampling(sequence, num_tokens + line, eos_token_ids) for line in range(1, num_lines)]
    return first, *others


def row_sampling(sequence: Sequence, num_tokens: int, eos_token_ids: frozenset[int]) -> RowSampling:
    """How the token after the first `num_tokens` is drawn; the history is of those known so far."""
    params = sequence.request.sampling
    needs_history = params.needs_history
    output_index = num_tokens - sequence.num_prompt_tokens
    constraint = sequence.constraint
    # What is decoded again is not drawn again, whatever comes out.
    is_drawn = num_tokens >= len(sequence.tokens)
    if constraint is not None and is_drawn and constraint.applies_at(output_index):
        banned: frozenset[int] = frozenset()  # the constraint has its own
    else:
        constraint, banned = None, banned_ids(params, eos_token_ids, output_index)
    return RowSampling(
        params=params,
        output_index=output_index,
        prompt_token_ids=sequence.request.prompt_token_ids if needs_history else (),
        output_token_ids=tuple(sequence.output_token_ids[:output_index]) if needs_history else (),
        banned_token_ids=banned,
        constraint=constraint,
    )
