"""The outermost layer of every HTTP request: its id, Host and Origin checks, metrics, last resort."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiln_common import tracing
from kiln_common.errors import KilnError
from kiln_common.ids import new_id
from kiln_common.loopback import LOOPBACK_NAMES
from kiln_gateway.errors import BodyTooSlow, HeadersTooLarge, HostNotAllowed, OriginNotAllowed
from kiln_gateway.http_errors import error_response, unexpected
from kiln_gateway.insight.live_requests import arrived_at
from kiln_gateway.metrics import GatewayMetrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MADE_REQUEST_ID = re.compile(r"req_(?!0{32})([0-9a-f]{32})")
MOST_HEADER_BYTES = 32 * 1024  # of one request, with its URL
_SAFE_HEADERS = {
    # Nothing that is answered is to be run or framed by a browser; a page says itself what it needs.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_UPLOADS = frozenset({"/v1/datasets", "/v1/adapters/upload"})
# Asked again and again by machines: not traced.
_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})


class EdgeMiddleware:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Sequence[str],
        allowed_origins: Sequence[str],
        metrics: GatewayMetrics,
        body_pause_s: float,
        body_timeout_s: float,
        upload_timeout_s: float,
    ) -> None:
        self._app = app
        self._allowed_hosts = LOOPBACK_NAMES | {host.lower() for host in allowed_hosts}
        self._allowed_origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._metrics = metrics
        self._body_pause_s = body_pause_s
        self._body_timeout_s = body_timeout_s
        self._upload_timeout_s = upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        traceparent = headers.get("traceparent", "")
        request_id, trace_id = _ids(headers, traceparent)
        scope.setdefault("state", {})["request_id"] = request_id
        started_at = time.monotonic()
        arrived_at.set(started_at)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["X-Request-Id"] = request_id
                for name, value in _SAFE_HEADERS.items():
                    answer_headers.setdefault(name, value)
            await send(message)

        fields = {"request_id": request_id}
        if trace_id not in request_id:
            fields["trace_id"] = trace_id
        with (
            structlog.contextvars.bound_contextvars(**fields),
            _span_of(scope, request_id, trace_id, traceparent) as span,
        ):
            try:
                _check_size(scope)
                self._check_host_and_origin(headers)
                await self._app(scope, self._patient(receive, scope["path"]), send_with_id)
            except KilnError as error:
                await error_response(error, request_id, path=scope["path"])(scope, receive, send_with_id)
            except Exception as error:  # noqa: BLE001 the outermost frame: a bug becomes a 500
                hidden = unexpected(error)
                if status == 0:
                    await error_response(hidden, request_id, path=scope["path"])(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                if span is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.response.status_code", status)
                self._metrics.observe_request(route, scope["method"], status, time.monotonic() - started_at)

    def _patient(self, receive: Receive, path: str) -> Receive:
        """`receive`, which raises BodyTooSlow where the body pauses, or takes, too long."""
        # A whole file comes in its own time; against slow clients there is the longest pause.
        timeout_s = self._upload_timeout_s if path in _UPLOADS else self._body_timeout_s
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        is_whole = False

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            now_s = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(min(deadline_s, now_s + self._body_pause_s)):
                    message = await receive()
            except TimeoutError:
                is_whole = True
                raise BodyTooSlow(
                    f"the body paused for {self._body_pause_s:g} s, or took longer than {timeout_s:g} s"
                ) from None
            is_whole = not message.get("more_body", False)
            return message

        return receive_in_time

    def _check_host_and_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if "*" not in self._allowed_hosts and _host_name(host) not in self._allowed_hosts:
            raise HostNotAllowed(f"this server does not answer to the host {host!r}")
        origin = headers.get("origin")
        if origin is None or origin.lower().rstrip("/") in self._allowed_origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise OriginNotAllowed(f"pages of {origin!r} may not call this server")


def _check_size(scope: Scope) -> None:
    """Raises HeadersTooLarge."""
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MOST_HEADER_BYTES:
        raise HeadersTooLarge(f"headers and URL have {num_bytes} bytes, at most {MOST_HEADER_BYTES}")


def _host_name(host: str) -> str:
    """ "[::1]:8420" as "::1", "localhost:8420" as "localhost"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _ids(headers: Headers, traceparent: str) -> tuple[str, str]:
    """A request's id, and that of its trace: one is the other's digits, unless the client chose both."""
    trace_id = tracing.trace_id_of(traceparent)
    given = headers.get("x-request-id", "")
    if not _REQUEST_ID.fullmatch(given):
        request_id = f"req_{trace_id}" if trace_id else new_id("req")
        return request_id, request_id.removeprefix("req_")
    made = _MADE_REQUEST_ID.fullmatch(given)
    return given, trace_id or (made.group(1) if made else tracing.new_trace_id())


def _span_of(
    scope: Scope, request_id: str, trace_id: str, traceparent: str
) -> contextlib.AbstractContextManager[Any]:
    """The span of a whole request; None where it is not traced."""
    if not tracing.is_on() or scope["path"] in _UNTRACED:
        return contextlib.nullcontext()
    attributes = {"http.request.method": scope["method"], "kiln.request_id": request_id}
    return tracing.root_span(scope["method"], trace_id, traceparent, attributes)
