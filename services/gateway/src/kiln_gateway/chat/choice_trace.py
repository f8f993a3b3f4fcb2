"""The spans of one choice; made only where the request is traced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from kiln_common import tracing
from kiln_common.pb import engine_pb2
from kiln_gateway.chat.choice import ChoiceAssembler, ChoiceDelta


class ChoiceTrace:
    """A span from submission to end, and below it how long taking the tokens apart took in all.

    It is not made the span under way: a generator may be resumed by another task.
    """

    def __init__(
        self, request: engine_pb2.GenerateRequest, assembler: ChoiceAssembler, traceparent: str
    ) -> None:
        self._assembler = assembler
        self._span = tracing.start_span(
            "choice", parent=traceparent, attributes={"kiln.request": request.request_id}
        )
        self.traceparent = tracing.traceparent_of(self._span)
        request.traceparent = self.traceparent
        self._first_s = self._last_s = 0.0
        self._busy_s = 0.0

    def push(self, output: engine_pb2.SequenceOutput) -> ChoiceDelta:
        """The assembler's push, timed."""
        if output.token_ids and not self._first_s:
            self._first_s = time.time()
            self._span.add_event("first_token")
        began_s = time.perf_counter()
        delta = self._assembler.push(output)
        self._busy_s += time.perf_counter() - began_s
        self._last_s = time.time()
        return delta

    def end(self, error: BaseException | None) -> None:
        if self._first_s:
            busy = {"kiln.busy_s": round(self._busy_s, 6)}
            tracing.record_span(
                "detokenise", self._first_s, self._last_s, parent=self.traceparent, attributes=busy
            )
        self._span.set_attribute("kiln.completion_tokens", len(self._assembler.tokens))
        self._span.set_attribute("kiln.finish_reason", self._assembler.finish_reason or "")
        if error is not None:
            tracing.mark_failed(self._span, error)
        self._span.end()


@contextlib.contextmanager
def choice_trace(
    request: engine_pb2.GenerateRequest, assembler: ChoiceAssembler
) -> Iterator[ChoiceTrace | None]:
    """The trace of a choice that runs within the block; None where nobody traces its request."""
    traceparent = tracing.current_traceparent()
    if not traceparent:
        yield None
        return
    trace = ChoiceTrace(request, assembler, traceparent)
    failure: BaseException | None = None
    try:
        yield trace
    except Exception as error:
        failure = error
        raise
    finally:
        trace.end(failure)
