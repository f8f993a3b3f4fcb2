"""OpenTelemetry traces: off, and then free of cost, unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

A context travels as a W3C `traceparent`: in gRPC metadata, in GenerateRequest, in a job's record. Spans
carry codes, ids and numbers, never the text of errors, prompts or answers.
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from kiln_common.errors import KilnError
from kiln_common.settings import read_settings

if TYPE_CHECKING:  # the SDK is imported only where traces are exported
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

P = ParamSpec("P")
T = TypeVar("T")
Attributes = Mapping[str, str | int | float | bool] | None

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")
_tracer: Tracer | None = None
# The trace id of the next span without a parent; 0 lets it be random.
_wanted_trace_id: ContextVar[int] = ContextVar("wanted_trace_id", default=0)


class TracingSettings(BaseSettings):
    """Of every service. The exporter reads the other OTEL_EXPORTER_OTLP_, OTEL_BSP_ and OTEL_TRACES_SAMPLER
    variables of OpenTelemetry itself."""

    model_config = SettingsConfigDict(env_prefix="OTEL_", frozen=True)

    exporter_otlp_endpoint: str = Field(
        "", description="OTLP collector (gRPC) that gets traces, such as http://localhost:4317; empty: none"
    )


def configure_tracing(service: str) -> None:
    """Export this process's traces if a collector is configured; call once, before channels are opened."""
    global _tracer
    if not read_settings(TracingSettings).exporter_otlp_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class RequestIds(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return _wanted_trace_id.get() or super().generate_trace_id()

    resource = Resource.create({"service.name": f"kiln-{service}"})
    provider = TracerProvider(resource=resource, id_generator=RequestIds())
    # Flushed when the interpreter ends.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("kiln")


def is_on() -> bool:
    return _tracer is not None


def trace_id_of(traceparent: str) -> str:
    """The 32 hex digits of a valid traceparent, else nothing."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found.group(1) if found else ""


def new_trace_id() -> str:
    return secrets.token_hex(16)


def current_traceparent() -> str:
    """That of the span under way, for whoever goes on with the work; empty without one that is recorded."""
    if _tracer is None:
        return ""
    from opentelemetry.trace import get_current_span

    return traceparent_of(get_current_span())


def traceparent_of(span: Span) -> str:
    """Empty for a span that is not recorded. One that has ended still has what goes on from it."""
    context = span.get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def start_span(
    name: str, *, parent: str | None = None, start_s: float | None = None, attributes: Attributes = None
) -> Span:
    """A span that the caller ends. Only while tracing is on.

    `parent` is a traceparent ("" is none), by default the span under way; `start_s` is in seconds since the epoch.
    """
    assert _tracer is not None, "spans are started only while tracing is on"
    context = None if parent is None else _context_of(parent)
    return _tracer.start_span(name, context=context, start_time=_ns(start_s), attributes=attributes)


def record_span(
    name: str, start_s: float, end_s: float, *, parent: str, attributes: Attributes = None
) -> None:
    """A span of the past, below `parent`; nothing where that is empty."""
    if _tracer is not None and parent:
        past = start_span(name, parent=parent, start_s=start_s, attributes=attributes)
        past.end(_ns(end_s))


@contextlib.contextmanager
def span(name: str, *, parent: str | None = None, attributes: Attributes = None) -> Iterator[Span | None]:
    """A span around the block, below the one under way; an error marks it with its code.

    None, and no cost, where tracing is off or there is nothing to be below.
    """
    parent = current_traceparent() if parent is None else parent
    if _tracer is None or not parent:
        yield None
        return
    with use_span(start_span(name, parent=parent, attributes=attributes)) as started:
        yield started


@contextlib.contextmanager
def root_span(name: str, trace_id: str, parent: str, attributes: Attributes = None) -> Iterator[Span | None]:
    """The first span of this process for a request: below `parent`, or else the beginning of `trace_id`."""
    if _tracer is None:
        yield None
        return
    token = _wanted_trace_id.set(int(trace_id, 16))
    try:
        started = start_span(name, parent=parent, attributes=attributes)
    finally:
        _wanted_trace_id.reset(token)
    with use_span(started) as used:
        yield used


@contextlib.contextmanager
def use_span(started: Span) -> Iterator[Span]:
    """Let a span be the one under way, and end it with the block."""
    from opentelemetry.trace import use_span as attach

    with attach(started, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield started
        except Exception as error:
            mark_failed(started, error)
            raise


def mark_failed(failed: Span, error: BaseException) -> None:
    """Say by its code that a span ended with an error; messages may quote what users wrote.

    What the caller got wrong, such as a name that is not there, is no failure of the one who says so.
    """
    from opentelemetry.trace import Status, StatusCode

    code = error.code if isinstance(error, KilnError) else type(error).__name__
    if not isinstance(error, KilnError) or error.kind.http_status >= 500:
        failed.set_status(Status(StatusCode.ERROR, code))
    failed.set_attribute("error.type", code)


def traced(name: str) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
    """A span around each call of a coroutine function, below the one under way."""

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return await function(*args, **kwargs)

        return call

    return decorate


def _context_of(traceparent: str) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=Context())


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
