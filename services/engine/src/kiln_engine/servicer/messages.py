"""Events of the loop as wire messages."""

from __future__ import annotations

from collections.abc import Sequence

from kiln_common.pb import engine_pb2
from kiln_common.rpc import to_error_detail
from kiln_engine.domain.result import FinishReason, ReadoutResult, RowResult, SequenceEvent

_FINISH_REASONS = {
    None: engine_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: engine_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: engine_pb2.FINISH_REASON_ERROR,
}


def step_outputs(events: list[SequenceEvent]) -> engine_pb2.StepOutputs:
    """One message for what one step did to one client's requests: one output for each of them."""
    by_request: dict[str, engine_pb2.SequenceOutput] = {}
    for event in events:
        # With speculation a step may draw several tokens of a request.
        known = by_request.get(event.request_id)
        if known is None:
            by_request[event.request_id] = sequence_output(event)
        else:
            _add(known, event)
    return engine_pb2.StepOutputs(outputs=by_request.values())


def sequence_output(event: SequenceEvent) -> engine_pb2.SequenceOutput:
    output = engine_pb2.SequenceOutput(request_id=event.request_id)
    _add(output, event)
    return output


def _add(output: engine_pb2.SequenceOutput, event: SequenceEvent) -> None:
    output.finish_reason = _FINISH_REASONS[event.finish_reason]
    if event.row is not None:
        _add_row(output, event.row)
    if event.readout is not None:
        _add_readout(output, event.readout, is_packed=event.packs_readout)
    if event.error is not None:
        output.error.CopyFrom(to_error_detail(event.error))
    if event.is_first:
        output.num_cached_tokens = event.num_cached_tokens
        output.seed = event.seed
        output.queue_s = event.queue_s
    for version in event.moved_to:
        output.moved_to.add(name=version.name, version=version.version, sha256=version.sha256)


def _add_row(output: engine_pb2.SequenceOutput, row: RowResult) -> None:
    output.token_ids.append(row.token_id)
    output.logprobs.append(row.logprob)
    output.sampled_logprobs.append(row.sampled_logprob)
    if row.top_logprobs:
        output.top_logprobs.append(_top_logprobs(row.top_logprobs))


def _add_readout(output: engine_pb2.SequenceOutput, readout: ReadoutResult, *, is_packed: bool) -> None:
    output.prompt_logprobs.extend(readout.logprobs)
    if is_packed:
        output.packed_top_token_ids = readout.top.token_ids
        output.packed_top_logprobs = readout.top.logprobs
    else:
        output.top_prompt_logprobs.extend(map(_top_logprobs, readout.top.rows()))
    output.embedding.extend(readout.embedding)


def _top_logprobs(pairs: Sequence[tuple[int, float]]) -> engine_pb2.TopLogprobs:
    return engine_pb2.TopLogprobs(
        token_ids=[token_id for token_id, _ in pairs], logprobs=[logprob for _, logprob in pairs]
    )
