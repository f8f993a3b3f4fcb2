"""What can go wrong, one class each.

KilnError
├── ApiError            the server refused: code, hint, request_id, http_status
│   ├── InvalidRequestError (400)  AuthenticationError (401)  PermissionDeniedError (403)
│   ├── NotFoundError (404)  ConflictError (409)  TooLargeError (413)
│   ├── RateLimitError (429, retry_after_s)  UnavailableError (503, retry_after_s)
│   └── ServerError (500)  NotBuiltError (501)  ServerTimeoutError (504)
├── ConnectionFailed    nothing answered, or the answer broke off
├── WaitTimedOut        the job had not ended in the time given
└── JobFailed, JobCancelled, GateNotPassed, EvalFailed        it ended, and not well
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kiln.values import JobState


class KilnError(Exception):
    """Base of all errors of this package: a stable `code`, a message, and a `hint` that says what to do."""

    code = "client_error"
    hint = ""

    def __init__(self, message: str, *, code: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.hint = hint or self.hint

    def __str__(self) -> str:
        return f"{self.message} ({self.code}). {self.hint}".strip()


class ApiError(KilnError):
    """The server's own refusal. `param` is the field at fault, `request_id` what the server's log calls it.

    `details` is what a code adds for programs, such as the broken lines of an upload.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        hint: str = "",
        http_status: int = 0,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float = 0.0,
        details: Any = None,
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.http_status = http_status
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.details = details


class InvalidRequestError(ApiError):
    """400: something in the request is wrong; `param` names it."""


class AuthenticationError(ApiError):
    """401: no key, or one that the server does not know."""


class PermissionDeniedError(ApiError):
    """403: the key's scopes do not allow it."""


class NotFoundError(ApiError):
    """404: no such adapter, job, data set, run or route."""


class ConflictError(ApiError):
    """409: what is there does not allow it now, such as deleting an attached adapter."""


class TooLargeError(ApiError):
    """413: the body or the job does not fit."""


class RateLimitError(ApiError):
    """429: too much at once; `retry_after_s` says when to try again."""


class ServerError(ApiError):
    """500, or an answer that no Kiln server gives."""


class NotBuiltError(ApiError):
    """501: part of the contract, and not built yet."""


class UnavailableError(ApiError):
    """503: a part of the server does not answer now; `retry_after_s` says when to try again."""


class ServerTimeoutError(ApiError):
    """504: the server did not get it done in time."""


class ConnectionFailed(KilnError):
    """Nothing answered, or the answer broke off."""

    code = "connection_failed"
    hint = "Is it running? `kiln up` starts a server; KILN_URL, --url or Client(base_url=…) names another."


class WaitTimedOut(KilnError):
    """The job had not ended in the time given; it goes on."""

    code = "wait_timed_out"
    hint = "Wait longer, or look at the job later by its id."


class JobFailed(KilnError):
    """The job ended as failed; `job` has all that is known."""

    def __init__(self, job: JobState) -> None:
        error = job.error or {}
        super().__init__(
            f"job {job.id} failed: {error.get('message') or 'no reason was given'}",
            code=error.get("code") or "job_failed",
            hint=error.get("hint") or "",
        )
        self.job = job


class JobCancelled(KilnError):
    """The job was cancelled; `job` has all that is known."""

    code = "job_cancelled"

    def __init__(self, job: JobState) -> None:
        super().__init__(f"job {job.id} was cancelled at step {job.step} of {job.num_steps}")
        self.job = job


class GateNotPassed(KilnError):
    """The job ran to its end, but what it learned did not pass its gate; `job` has all that is known."""

    code = "gate_not_passed"
    hint = "Nothing was published under the adapter's name; what the job learned is kept under the job's id."

    def __init__(self, job: JobState) -> None:
        reason = (job.result or {})["gate"].get("reason") or "no reason was given"
        super().__init__(f"job {job.id} did not pass its gate: {reason}")
        self.job = job


class EvalFailed(KilnError):
    """The evaluation could not be carried out; `run` has all that is known."""

    def __init__(self, run: dict[str, Any]) -> None:
        error = run.get("error") or {}
        super().__init__(
            f"run {run['id']} failed: {error.get('message') or 'no reason was given'}",
            code=error.get("code") or "eval_failed",
            hint=error.get("hint") or "",
        )
        self.run = run


_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    422: InvalidRequestError,
    429: RateLimitError,
    501: NotBuiltError,
    503: UnavailableError,
    504: ServerTimeoutError,
}
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "not_implemented_error": 501,
    "unavailable_error": 503,
    "timeout_error": 504,
}


def error_of_answer(http_status: int, body: bytes, headers: Any) -> ApiError:
    """The error of an answer whose status is 400 or above."""
    try:
        fields = json.loads(body)["error"]
        message = fields["message"]
    except (ValueError, KeyError, TypeError):
        fields = {}
        message = f"the server answered {http_status}: {body[:200].decode(errors='replace').strip()}"
    return _build(
        fields,
        message=message,
        http_status=http_status,
        request_id=headers.get("x-request-id"),
        retry_after_s=_seconds(headers.get("retry-after")),
    )


def error_of_event(fields: dict[str, Any]) -> ApiError:
    """The error of an `{"error": …}` event within a stream."""
    status = _STATUS_OF_TYPE.get(fields.get("type", ""), 500)
    return _build(fields, message=str(fields.get("message")), http_status=status)


def _build(
    fields: dict[str, Any],
    *,
    message: str,
    http_status: int,
    request_id: str | None = None,
    retry_after_s: float = 0.0,
) -> ApiError:
    return _BY_STATUS.get(http_status, ServerError if http_status >= 500 else InvalidRequestError)(
        message,
        code=fields.get("code") or f"http_{http_status}",
        hint=fields.get("hint") or "",
        http_status=http_status,
        param=fields.get("param"),
        request_id=fields.get("request_id") or request_id,
        retry_after_s=retry_after_s,
        details=fields.get("details"),
    )


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # a date
        return 0.0
