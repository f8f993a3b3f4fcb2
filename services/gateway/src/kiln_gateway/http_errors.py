"""KilnError as an HTTP answer, and everything else a framework may raise turned into one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kiln_common.errors import InvalidValue, KilnError
from kiln_common.ids import new_id
from kiln_gateway.errors import BodyTooSlow, HttpRefused, MethodNotAllowed, RouteNotFound
from kiln_gateway.messages_api.errors import message_error_body

log = structlog.get_logger()
_MESSAGES = "/v1/messages"


def error_body(error: KilnError, request_id: str) -> dict[str, Any]:
    """The error object of the HTTP contract, also sent inside streams."""
    body: dict[str, Any] = {
        "message": str(error),
        "type": error.kind.api_type,
        "param": error.param or None,
        "code": error.code,
        "hint": error.hint or None,
        "request_id": request_id,
    }
    if error.details is not None:
        body["details"] = dict(error.details)
    return {"error": body}


def body_for(path: str) -> Callable[[KilnError, str], dict[str, Any]]:
    """How errors of this route are written."""
    return message_error_body if path.startswith(_MESSAGES) else error_body


def error_response(
    error: KilnError, request_id: str, *, path: str = "", status: int | None = None
) -> JSONResponse:
    """The whole answer on the route `path`; `status` overrides the kind's own (405 has no kind)."""
    status = status or error.kind.http_status
    headers = {}
    if error.retry_after_s > 0:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status < 500 or status == 501:
        # OpenAI's clients would try a 409 or 501 again by themselves; this tells them not to.
        headers["x-should-retry"] = "false"
    if path.startswith(_MESSAGES):
        headers["request-id"] = request_id  # where Anthropic's clients look for it
    if isinstance(error, BodyTooSlow):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_for(path)(error, request_id), status_code=status, headers=headers)


def request_id_of(request: Request) -> str:
    return getattr(request.state, "request_id", None) or new_id("req")


def unexpected(error: BaseException) -> KilnError:
    """What a client learns of a bug: that there is one. The log has the traceback."""
    log.error("unexpected_error", exc_info=error)
    return KilnError("the gateway failed unexpectedly", hint="The gateway's log has the traceback.")


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(KilnError)
    async def on_kiln_error(request: Request, error: KilnError) -> JSONResponse:
        return error_response(error, request_id_of(request), path=request.url.path)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(
            _routing_error(request, error),
            request_id_of(request),
            path=request.url.path,
            status=error.status_code,
        )

    @app.exception_handler(RequestValidationError)
    async def on_bad_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return error_response(InvalidValue(f"{name}: {first['msg']}", param=name), request_id_of(request))


def _routing_error(request: Request, error: HTTPException) -> KilnError:
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return RouteNotFound(route)
    if error.status_code == MethodNotAllowed.http_status:
        return MethodNotAllowed(route)
    return HttpRefused(str(error.detail))
