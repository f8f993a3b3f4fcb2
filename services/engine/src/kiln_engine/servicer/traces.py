"""Spans of requests that came with a trace context, made on the asyncio thread from what the loop tells.

The loop knows nothing of them: a span begins when its request arrives, its parts are recorded once
they are over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kiln_common import tracing
from kiln_common.errors import KilnError
from kiln_common.pb import engine_pb2
from kiln_engine.domain.result import SequenceEvent

# Versions whose first token is waited for; the oldest gives way.
_MOST_AWAITED = 64


class AwaitedVersions:
    """Versions that serve since a short while and have drawn nothing yet, each with the trace that made it."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[str, float]] = {}  # sha256: traceparent, when it could serve

    def expect(self, sha256: str, traceparent: str) -> None:
        """The version serves from now on; an empty traceparent is nobody's."""
        if traceparent:
            self._since[sha256] = traceparent, time.time()
            if len(self._since) > _MOST_AWAITED:
                del self._since[next(iter(self._since))]

    def among(self, adapters: Sequence[Any]) -> tuple[str, ...]:
        """The hashes of those that a request applies."""
        return tuple(adapter.sha256 for adapter in adapters if adapter.sha256 in self._since)

    def drew(self, sha256: str, request_id: str) -> None:
        """The version's first token is there: tell the trace that made it."""
        traceparent, since_s = self._since.pop(sha256, ("", 0.0))
        tracing.record_span(
            "adapter.first_token",
            since_s,
            time.time(),
            parent=traceparent,
            attributes={"kiln.request": request_id},
        )


@dataclass(slots=True)
class _Open:
    span: Any  # None where only a version's first token is waited for
    arrived_s: float
    awaited: tuple[str, ...]
    first_token_s: float = 0.0
    num_tokens: int = 0


class SessionTraces:
    """The traced requests of one client's stream."""

    def __init__(self, awaited: AwaitedVersions) -> None:
        self._awaited = awaited
        self._open: dict[str, _Open] = {}

    def began(self, message: engine_pb2.GenerateRequest) -> None:
        """A request was accepted."""
        awaited = self._awaited.among(message.adapters)
        span = None
        if tracing.trace_id_of(message.traceparent):
            span = tracing.start_span(
                "engine.request",
                parent=message.traceparent,
                attributes={
                    "kiln.request": message.request_id,
                    "kiln.prompt_tokens": len(message.prompt_token_ids),
                },
            )
        if span is not None or awaited:
            self._open[message.request_id] = _Open(span, time.time(), awaited)

    def saw(self, events: Sequence[SequenceEvent]) -> None:
        """What a step did is about to be sent."""
        if not self._open:
            return
        for event in events:
            known = self._open.get(event.request_id)
            if known is None:
                continue
            known.num_tokens += event.row is not None
            if event.is_first:
                self._saw_first(known, event)
            if event.finish_reason is not None:
                self._end(self._open.pop(event.request_id), event.finish_reason.value, event.error)

    def close(self) -> None:
        """The client has left: what is open was aborted."""
        for known in self._open.values():
            self._end(known, "abort", None)
        self._open.clear()

    def _saw_first(self, known: _Open, event: SequenceEvent) -> None:
        known.first_token_s = time.time()
        if event.row is not None:
            for sha256 in known.awaited:
                self._awaited.drew(sha256, event.request_id)
        if known.span is None:
            return
        parent = tracing.traceparent_of(known.span)
        scheduled_s = known.arrived_s + event.queue_s
        tracing.record_span("engine.queue", known.arrived_s, scheduled_s, parent=parent)
        tracing.record_span(
            "engine.prefill", scheduled_s, known.first_token_s, parent=parent,
            attributes={"kiln.cached_tokens": event.num_cached_tokens},
        )  # fmt: skip
        known.span.add_event("first_token")

    def _end(self, known: _Open, reason: str, error: KilnError | None) -> None:
        if known.span is None:
            return
        parent = tracing.traceparent_of(known.span)
        if known.first_token_s:
            tracing.record_span("engine.decode", known.first_token_s, time.time(), parent=parent)
        known.span.set_attribute("kiln.finish_reason", reason)
        known.span.set_attribute("kiln.completion_tokens", known.num_tokens)
        if error is not None:
            tracing.mark_failed(known.span, error)
        known.span.end()
