"""The outermost layer of every HTTP request: its id, Host and Origin checks, metrics, last resort."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiln_common.errors import KilnError
from kiln_common.ids import new_id
from kiln_common.loopback import LOOPBACK_NAMES
from kiln_gateway.errors import HostNotAllowed, OriginNotAllowed
from kiln_gateway.http_errors import error_response, unexpected
from kiln_gateway.insight.live_requests import arrived_at
from kiln_gateway.metrics import GatewayMetrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class EdgeMiddleware:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Sequence[str],
        allowed_origins: Sequence[str],
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._allowed_hosts = LOOPBACK_NAMES | {host.lower() for host in allowed_hosts}
        self._allowed_origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        started_at = time.monotonic()
        arrived_at.set(started_at)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id, **_trace_fields(headers)):
            try:
                self._check_host_and_origin(headers)
                await self._app(scope, receive, send_with_id)
            except KilnError as error:
                await error_response(error, request_id, path=scope["path"])(scope, receive, send_with_id)
            except Exception as error:  # noqa: BLE001 the outermost frame: a bug becomes a 500
                hidden = unexpected(error)
                if status == 0:
                    await error_response(hidden, request_id, path=scope["path"])(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                self._metrics.observe_request(route, scope["method"], status, time.monotonic() - started_at)

    def _check_host_and_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if "*" not in self._allowed_hosts and _host_name(host) not in self._allowed_hosts:
            raise HostNotAllowed(f"this server does not answer to the host {host!r}")
        origin = headers.get("origin")
        if origin is None or origin.lower().rstrip("/") in self._allowed_origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise OriginNotAllowed(f"pages of {origin!r} may not call this server")


def _host_name(host: str) -> str:
    """ "[::1]:8420" as "::1", "localhost:8420" as "localhost"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_id("req")


def _trace_fields(headers: Headers) -> dict[str, str]:
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return {"trace_id": found.group(1)} if found else {}
