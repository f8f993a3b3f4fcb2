"""Keys and scopes for gRPC clients that are not services of ours, on a listener of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

import grpc

from kiln_common.api_keys import Caller, KeyRing, require_scope
from kiln_common.errors import KilnError

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
# Say nothing that a key should guard.
_OPEN_PREFIXES = ("/grpc.health.", "/grpc.reflection.")


def current_caller() -> Caller | None:
    """Whose key the call under way carries; None for calls of services."""
    return _caller.get()


class KeyCheck(grpc.aio.ServerInterceptor):
    """Lets a call pass whose metadata has `authorization: Bearer KEY` with the scope that its method needs.

    `scopes`: by method name; the others need "admin".
    """

    def __init__(self, keys: KeyRing, scopes: Mapping[str, str]) -> None:
        self._keys = keys
        self._scopes = scopes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN_PREFIXES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            caller = self._keys.authenticate(str(metadata.get("authorization", "")))
            require_scope(caller, self._scopes.get(method.rpartition("/")[2], "admin"))
        except KilnError as error:
            return _refusal(handler, error)
        _caller.set(caller)  # of this call's task alone
        return handler


def _refusal(handler: grpc.RpcMethodHandler, error: KilnError) -> grpc.RpcMethodHandler:
    """A handler of the same kind that only raises."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> Any:
        raise error

    async def refuse_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        raise error
        yield

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    make, behaviour = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
