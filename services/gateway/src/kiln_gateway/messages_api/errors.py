"""Errors in Anthropic's envelope, with the code, hint and field that every error of Kiln has."""

from __future__ import annotations

from typing import Any

from kiln_common.errors import ErrorKind, KilnError

_TYPES = {
    ErrorKind.NOT_FOUND: "not_found_error",
    ErrorKind.TOO_LARGE: "request_too_large",
    ErrorKind.UNAUTHENTICATED: "authentication_error",
    ErrorKind.FORBIDDEN: "permission_error",
    ErrorKind.RATE_LIMITED: "rate_limit_error",
    ErrorKind.INTERNAL: "api_error",
    ErrorKind.NOT_IMPLEMENTED: "not_implemented_error",
    ErrorKind.UNAVAILABLE: "overloaded_error",
    ErrorKind.TIMEOUT: "timeout_error",
}


def message_error_body(error: KilnError, request_id: str) -> dict[str, Any]:
    """The answer to a request that failed, also sent as the event `error` inside streams."""
    return {
        "type": "error",
        "error": {
            "type": _TYPES.get(error.kind, "invalid_request_error"),
            "message": str(error),
            "param": error.param or None,
            "code": error.code,
            "hint": error.hint or None,
        },
        "request_id": request_id,
    }
