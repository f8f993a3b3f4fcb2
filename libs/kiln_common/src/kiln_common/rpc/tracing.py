"""Trace contexts across gRPC, in the metadata entry `traceparent`.

Long streams that belong to no single request (Session, WatchJob) carry none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kiln_common import tracing

_KEY = "traceparent"


def context_senders() -> list[grpc.aio.ClientInterceptor]:
    """Name the span under way in the metadata of calls with one answer."""
    return [_OfUnary(), _OfStream()]


class _OfUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Any, details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_context(details), request)


class _OfStream(grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, details: grpc.aio.ClientCallDetails, requests: Any
    ) -> Any:
        return await continuation(_with_context(details), requests)


class ReceiveContext(grpc.aio.ServerInterceptor):
    """A span, named after the method, around calls that come with a context and have one answer."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        parent = str(metadata.get(_KEY, ""))
        if handler is None or handler.response_streaming or not tracing.trace_id_of(parent):
            return handler
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        name = handler_call_details.method.removeprefix("/kiln.v1.")

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with tracing.span(name, parent=parent):
                return await inner(request, context)

        wrap = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(call, handler.request_deserializer, handler.response_serializer)


def _with_context(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    traceparent = tracing.current_traceparent()
    if not traceparent:
        return details
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata[_KEY] = traceparent
    return details._replace(metadata=metadata)
