"""When a completion ends."""

from __future__ import annotations

from kiln_common.errors import DeadlineExceeded
from kiln_engine.domain.request import SamplingParams
from kiln_engine.domain.result import FinishReason
from kiln_engine.scheduling.sequence import Sequence


def stop_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Ids that end this completion."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids


def banned_ids(params: SamplingParams, eos_token_ids: frozenset[int], num_outputs: int) -> frozenset[int]:
    """Ids that must not be drawn as output number `num_outputs`: stops that would come too early."""
    if num_outputs >= params.min_tokens:
        return frozenset()
    return stop_ids(params, eos_token_ids)


def finish_reason(
    params: SamplingParams,
    eos_token_ids: frozenset[int],
    *,
    token_id: int,
    num_outputs: int,
    num_tokens: int,
    max_num_tokens: int,
    has_rules: bool = False,
) -> FinishReason | None:
    """Why the completion ends with `token_id`, its `num_outputs`th token, or None if it goes on.

    `num_tokens` and `max_num_tokens` count prompt and completion together. Rules may leave nothing
    but a stop, however early.
    """
    if token_id in stop_ids(params, eos_token_ids) and (has_rules or num_outputs > params.min_tokens):
        return FinishReason.STOP
    if is_at_length(params, num_outputs, num_tokens, max_num_tokens):
        return FinishReason.LENGTH
    return None


def why_ended(sequence: Sequence, eos_token_ids: frozenset[int], max_num_tokens: int) -> FinishReason | None:
    """Why a sequence ends with its newest token, or None if it goes on."""
    return finish_reason(
        sequence.request.sampling,
        eos_token_ids,
        token_id=sequence.tokens[-1],
        num_outputs=sequence.num_outputs,
        num_tokens=len(sequence.tokens),
        max_num_tokens=max_num_tokens,
        has_rules=sequence.request.rules is not None,
    )


def is_at_length(params: SamplingParams, num_outputs: int, num_tokens: int, max_num_tokens: int) -> bool:
    """Whether a completion of `num_outputs` tokens goes no further, whatever they are."""
    return num_outputs >= params.max_tokens or num_tokens >= max_num_tokens


def deadline_error(sequence: Sequence, now: float) -> DeadlineExceeded:
    """What a request is told whose deadline has passed."""
    return DeadlineExceeded(
        f"the request ended after {now - sequence.request.arrival_s:.1f} s "
        f"with {sequence.num_outputs} of at most {sequence.request.sampling.max_tokens} tokens"
    )
