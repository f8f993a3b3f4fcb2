"""KilnError across gRPC: the servicer raises it, the client gets it back.

The trailing metadata entry `kiln-error-bin` carries ErrorDetail; so do messages that report the
failure of one request among several. The gRPC status repeats the kind for clients that are not ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

from kiln_common.errors import ErrorKind, KilnError, RemoteError
from kiln_common.pb import common_pb2

_METADATA_KEY = "kiln-error-bin"
# As gRPC writes them into its messages: unix:/run/engine.sock, ipv4:127.0.0.1:8431, each with a colon after it.
_ADDRESS = re.compile(r"\b(?:unix|unix-abstract|ipv4|ipv6|dns):\S+\s?")
log = structlog.get_logger()


def to_error_detail(error: KilnError) -> common_pb2.ErrorDetail:
    """The wire form of an error."""
    return common_pb2.ErrorDetail(
        code=error.code,
        message=str(error),
        hint=error.hint,
        param=error.param,
        retry_after_s=error.retry_after_s,
        status=error.kind.grpc_status,
        details_json=json.dumps(error.details) if error.details is not None else "",
    )


def from_error_detail(detail: common_pb2.ErrorDetail) -> RemoteError:
    """The error behind its wire form, with the code, kind, message and hint it had."""
    return RemoteError(
        detail.code,
        ErrorKind.from_grpc_status(detail.status),
        detail.message,
        hint=detail.hint,
        param=detail.param,
        retry_after_s=detail.retry_after_s,
        details=json.loads(detail.details_json) if detail.details_json else None,
    )


def from_rpc_error(error: grpc.RpcError, service: str, unavailable: type[KilnError]) -> KilnError:
    """The KilnError behind a failed call.

    A call that failed without our detail (connection refused, deadline) becomes `unavailable`,
    naming `service`.
    """
    status = error.code()  # type: ignore[attr-defined]
    for key, value in error.trailing_metadata() or ():  # type: ignore[attr-defined]
        if key == _METADATA_KEY:
            return from_error_detail(common_pb2.ErrorDetail.FromString(value))
    return unavailable(f"the {service} did not answer ({status.name.lower()}: {details_of(error)})")


def details_of(error: grpc.RpcError) -> str:
    """What gRPC says about a failed call, without addresses: clients of clients read it too."""
    details = error.details() or error.code().name.lower()  # type: ignore[attr-defined]
    return _ADDRESS.sub("", details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors raised by servicer methods into a status and an ErrorDetail.

    Errors without a code are bugs: they are logged with their traceback and answered as
    "internal_error" without their text.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if handler.response_streaming:
            inner_stream = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrap = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behaviour: Any = _guard_stream(inner_stream, method)
        else:
            inner_unary = handler.stream_unary if handler.request_streaming else handler.unary_unary
            wrap = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            behaviour = _guard_unary(inner_unary, method)
        return wrap(behaviour, handler.request_deserializer, handler.response_serializer)


def _guard_unary(inner: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await inner(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 the outermost frame: everything becomes a status
            await _abort(context, error, method)

    return call


def _guard_stream(inner: Any, method: str) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in inner(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 the outermost frame: everything becomes a status
            await _abort(context, error, method)

    return call


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if not isinstance(error, KilnError):
        log.error("unexpected_error", method=method, exc_info=error)
        error = KilnError("the service failed unexpectedly; its log has the traceback")
    status = grpc.StatusCode[error.kind.grpc_status]
    metadata = ((_METADATA_KEY, to_error_detail(error).SerializeToString()),)
    await context.abort(status, str(error), trailing_metadata=metadata)
