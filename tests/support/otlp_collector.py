"""An OTLP collector in this process: keeps the spans that services export over gRPC."""

from __future__ import annotations

import threading
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class CollectedSpan:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    events: tuple[str, ...]
    has_failed: bool


class OtlpCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Use as a context manager; `environment` makes a process export to it soon after each span."""

    def __init__(self) -> None:
        self._spans: list[CollectedSpan] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    @property
    def environment(self) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def __enter__(self) -> OtlpCollector:
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop(0).wait()

    def spans(self, trace_id: str = "") -> list[CollectedSpan]:
        """Those of a trace (or all), in order of their starts."""
        with self._lock:
            found = [span for span in self._spans if trace_id in ("", span.trace_id)]
        return sorted(found, key=lambda span: span.start_s)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            for group in request.resource_spans:
                (service,) = (
                    a.value.string_value for a in group.resource.attributes if a.key == "service.name"
                )
                self._spans += [_span(service, s) for scope in group.scope_spans for s in scope.spans]
        return pb.ExportTraceServiceResponse()


def _span(service: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_s=span.start_time_unix_nano / 1e9,
        end_s=span.end_time_unix_nano / 1e9,
        attributes={a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes},
        events=tuple(event.name for event in span.events),
        has_failed=span.status.code == span.status.STATUS_CODE_ERROR,
    )
