"""The error tree: every failure a user can meet has a class here or below one of these.

An error has a stable `code`, a `kind` that decides its HTTP and gRPC status, a message with the
numbers, and a `hint` that says what to do. It crosses process boundaries as `ErrorDetail`
(kiln_common.rpc.errors) and comes out on the other side with the same code, kind, message and hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class _Status:
    http: int
    grpc: str  # name of a grpc.StatusCode, so that this module does not import grpc
    type: str  # the `type` of API error bodies


class ErrorKind(Enum):
    """What sort of failure it is: the one table of HTTP status, gRPC status and API type."""

    INVALID_REQUEST = _Status(400, "INVALID_ARGUMENT", "invalid_request_error")
    NOT_FOUND = _Status(404, "NOT_FOUND", "invalid_request_error")
    CONFLICT = _Status(409, "ABORTED", "invalid_request_error")
    TOO_LARGE = _Status(413, "OUT_OF_RANGE", "invalid_request_error")
    UNAUTHENTICATED = _Status(401, "UNAUTHENTICATED", "authentication_error")
    FORBIDDEN = _Status(403, "PERMISSION_DENIED", "permission_error")
    RATE_LIMITED = _Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error")
    INTERNAL = _Status(500, "INTERNAL", "server_error")
    NOT_IMPLEMENTED = _Status(501, "UNIMPLEMENTED", "not_implemented_error")
    UNAVAILABLE = _Status(503, "UNAVAILABLE", "unavailable_error")
    TIMEOUT = _Status(504, "DEADLINE_EXCEEDED", "timeout_error")

    @property
    def http_status(self) -> int:
        return self.value.http

    @property
    def grpc_status(self) -> str:
        return self.value.grpc

    @property
    def api_type(self) -> str:
        return self.value.type

    @classmethod
    def from_grpc_status(cls, name: str) -> ErrorKind:
        """The kind of a gRPC status name; statuses we never send count as internal."""
        return next((kind for kind in cls if kind.grpc_status == name), cls.INTERNAL)


class KilnError(Exception):
    """Something failed that has no code of its own; the log of the service that answered has the traceback.

    The base of all errors that carry a code. Subclasses set `code`, `kind` and `hint`; instances may
    override hint, param (the request field at fault), retry_after_s (seconds after which trying again makes sense, 0 for never) and details
    (what the message says in numbers, for programs: a JSON object).
    """

    code: str = "internal_error"
    kind: ErrorKind = ErrorKind.INTERNAL
    hint: str = ""
    param: str = ""
    retry_after_s: float = 0.0
    details: Mapping[str, Any] | None = None

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint
        if param is not None:
            self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        if details is not None:
            self.details = details


class RemoteError(KilnError):
    """An error another service answered with; code, kind, message and hint are that service's."""

    def __init__(
        self,
        code: str,
        kind: ErrorKind,
        message: str,
        *,
        hint: str,
        param: str,
        retry_after_s: float,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, param=param, retry_after_s=retry_after_s, details=details)
        self.code = code
        self.kind = kind


class InvalidRequest(KilnError):
    """The request itself is wrong; trying it again unchanged cannot work."""

    code = "invalid_request"
    kind = ErrorKind.INVALID_REQUEST


class InvalidValue(InvalidRequest):
    """One field has a value outside what it allows; the message names both."""

    code = "invalid_value"


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for an answer within the model's context."""

    code = "prompt_too_long"
    hint = "Shorten the messages or lower max_tokens."

    def __init__(
        self, num_tokens: int, limit: int, *, is_counted: bool = True, param: str | None = None
    ) -> None:
        """`is_counted` is False where nobody counted beyond `num_tokens`."""
        count = str(num_tokens) if is_counted else f"more than {num_tokens}"
        super().__init__(f"the prompt has {count} tokens, the limit is {limit}", param=param)


class InvalidTokenIds(InvalidRequest):
    """A token id is negative or beyond the model's vocabulary."""

    code = "invalid_token_ids"
    hint = "Token ids must come from this model's tokenizer; POST /v1/tokenize gives them."


class GrammarNotSupported(InvalidRequest):
    """The grammar library does not understand the schema, expression or grammar; it says why."""

    code = "grammar_not_supported"
    param = "grammar"
    hint = "Leave out what the message names, or write it another way."

    def __init__(self, reason: str, *, param: str | None = None) -> None:
        super().__init__(f"the grammar cannot be enforced: {reason}", param=param)


class GrammarTooLarge(InvalidRequest):
    """The schema or grammar is longer than is compiled."""

    code = "grammar_too_large"
    param = "grammar"
    hint = "Send a smaller schema or grammar: fewer properties, fewer alternatives."


class DuplicateRequestId(KilnError):
    """A request of this id is running."""

    code = "duplicate_request_id"
    kind = ErrorKind.CONFLICT
    hint = "Give every request its own id."
    param = "request_id"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"a request with the id {request_id!r} is running")


class AdapterNotFound(KilnError):
    """No adapter that this key may see has this name, or it has no such version."""

    code = "adapter_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/adapters lists the names and versions there are."


class AdapterMismatch(InvalidRequest):
    """An adapter's tensors do not fit the base model."""

    code = "adapter_mismatch"
    hint = "Train or export the adapter for the model that is being served."


class JobNotFound(KilnError):
    """No training job that this key may see has this id."""

    code = "job_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/train/jobs lists the jobs there are."


class JobNotEnded(KilnError):
    """What was asked for exists once the job has ended."""

    code = "job_not_ended"
    kind = ErrorKind.CONFLICT
    hint = "Wait for the job's end, or cancel it."


class DatasetNotFound(KilnError):
    """No dataset that this key may see has this id."""

    code = "dataset_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/datasets lists the datasets there are."


class IdempotencyConflict(KilnError):
    """The Idempotency-Key was used before, for a request with another body."""

    code = "idempotency_conflict"
    kind = ErrorKind.CONFLICT
    hint = "Use a new Idempotency-Key for a different body."


class Unavailable(KilnError):
    """A service this one needs does not answer now."""

    code = "unavailable"
    kind = ErrorKind.UNAVAILABLE
    hint = "Try again in a moment; GET /readyz says which part is missing."
    retry_after_s = 1.0


class EngineUnavailable(Unavailable):
    """No engine that serves this model answers: it starts, was restarted, or cannot be reached."""

    code = "engine_unavailable"


class TrainerUnavailable(Unavailable):
    """No trainer answers, so jobs are neither taken nor told about; chat goes on."""

    code = "trainer_unavailable"


class RegistryUnavailable(Unavailable):
    """The registry does not answer, so adapters cannot be looked up, published or changed now."""

    code = "registry_unavailable"


class QueueUnavailable(Unavailable):
    """Redis does not answer: rollouts and training wait, chat goes on."""

    code = "queue_unavailable"


class QueueNotDurable(KilnError):
    """The configured Redis could lose an accepted job, so none is accepted."""

    code = "queue_not_durable"
    kind = ErrorKind.UNAVAILABLE
    hint = "Run Redis with appendonly yes, appendfsync always and maxmemory-policy volatile-ttl."


class Overloaded(KilnError):
    """As much is waiting already as may wait."""

    code = "overloaded"
    kind = ErrorKind.RATE_LIMITED
    hint = "Send fewer requests at once, or try again after Retry-After seconds."
    retry_after_s = 1.0


class DeadlineExceeded(KilnError):
    """The answer was not complete when its time was over."""

    code = "deadline_exceeded"
    kind = ErrorKind.TIMEOUT
    hint = "Ask for fewer tokens, or allow more time."


class NotBuiltYet(KilnError):
    """Named in the HTTP contract, not there yet."""

    code = "not_implemented"
    kind = ErrorKind.NOT_IMPLEMENTED
    hint = "docs/status.md lists what works today."
