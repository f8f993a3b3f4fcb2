"""What the runner needs to know about a sequence in one step."""

from __future__ import annotations

from kiln_engine.domain.plan import DecodeRow, PrefillChunk, RowSampling
from kiln_engine.scheduling.sequence import Sequence
from kiln_engine.scheduling.stopping import banned_ids


def decode_row(sequence: Sequence, page_tokens: int, eos_token_ids: frozenset[int]) -> DecodeRow:
    """The row that feeds the sequence's newest token. Its page must be there already."""
    assert sequence.state_slot is not None
    position = sequence.num_computed
    assert position == len(sequence.tokens) - 1
    completes_page = (position + 1) % page_tokens == 0
    return DecodeRow(
        sequence_id=sequence.sequence_id,
        token_id=sequence.tokens[position],
        position=position,
        page_ids=tuple(sequence.page_ids),
        state_read_slot=sequence.state_slot,
        state_slot=sequence.state_slot,
        state_commit_slot=sequence.state_slot if completes_page else None,
        adapter_slots=sequence.adapter_slots,
        sampling=row_sampling(sequence, eos_token_ids),
    )


def prefill_chunk(
    sequence: Sequence, num_tokens: int, page_tokens: int, eos_token_ids: frozenset[int]
) -> PrefillChunk:
    """The chunk that computes the next `num_tokens` tokens, with the checkpoints taken for it."""
    assert sequence.state_slot is not None
    start = sequence.num_computed
    end = start + num_tokens
    is_last = end == len(sequence.tokens)
    own_state = sequence.state_slot if start > 0 else None
    return PrefillChunk(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.tokens[start:end]),
        start=start,
        page_ids=tuple(sequence.page_ids[: -(-end // page_tokens)]),
        state_read_slot=own_state if sequence.read_slot is None else sequence.read_slot,
        state_slot=sequence.state_slot,
        checkpoints=sequence.pending_checkpoints,
        adapter_slots=sequence.adapter_slots,
        sampling=row_sampling(sequence, eos_token_ids) if is_last else None,
    )


def row_sampling(sequence: Sequence, eos_token_ids: frozenset[int]) -> RowSampling:
    """How the sequence's next token is drawn."""
    params = sequence.request.sampling
    needs_history = params.needs_history
    return RowSampling(
        params=params,
        output_index=sequence.num_outputs,
        prompt_token_ids=sequence.request.prompt_token_ids if needs_history else (),
        output_token_ids=tuple(sequence.output_token_ids) if needs_history else (),
        banned_token_ids=banned_ids(params, eos_token_ids, sequence.num_outputs),
    )
