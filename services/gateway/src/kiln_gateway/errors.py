"""Errors only the gateway raises; the shared ones are in kiln_common.errors."""

from __future__ import annotations

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError, Unavailable
from kiln_common.settings import ConfigurationError

_ROUTES_HINT = "GET /openapi.json has the routes there are; docs/api.md lists them."


class InvalidField(InvalidRequest):
    """A body that breaks its schema; `code` says how, and is `invalid_value` or in request_body.HINTS."""

    def __init__(self, code: str, message: str, *, param: str, hint: str) -> None:
        super().__init__(message, param=param, hint=hint)
        self.code = code


class InvalidJson(InvalidRequest):
    """The request's body is not a JSON object."""

    code = "invalid_json"
    hint = "Send one JSON object with Content-Type: application/json."


class BodyTooLarge(KilnError):
    """The request's body is larger than the gateway takes."""

    code = "body_too_large"
    kind = ErrorKind.TOO_LARGE
    hint = (
        "Send less at once, or raise KILN_GATEWAY_MAX_BODY_BYTES (KILN_GATEWAY_MAX_UPLOAD_BYTES for uploads)."
    )

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than the limit of {limit_bytes} bytes")


class HeadersTooLarge(KilnError):
    """The request's headers, or its URL, are longer than the gateway reads."""

    code = "headers_too_large"
    kind = ErrorKind.TOO_LARGE
    hint = "Send fewer or shorter headers and a shorter URL."


class BodyTooSlow(InvalidRequest):
    """The request's body stopped arriving, or took longer than a request may."""

    code = "body_too_slow"
    hint = "Send the request's body without long pauses."


class RouteNotFound(KilnError):
    """There is no such path."""

    code = "route_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = _ROUTES_HINT

    def __init__(self, route: str) -> None:
        super().__init__(f"there is no {route}")


class MethodNotAllowed(InvalidRequest):
    """The path is known, with other methods."""

    code = "method_not_allowed"
    http_status = 405  # no kind has it: gRPC has no such status
    hint = _ROUTES_HINT

    def __init__(self, route: str) -> None:
        super().__init__(f"{route} is not a method of this route")


class HttpRefused(InvalidRequest):
    """The web framework refused the request before a route saw it; the message is its own."""

    code = "http_error"
    hint = _ROUTES_HINT


class UnsupportedField(InvalidRequest):
    """A field of OpenAI's API that would change the answer and that Kiln does not offer."""

    code = "unsupported_field"
    hint = "Leave the field out."

    def __init__(self, field: str, hint: str | None = None) -> None:
        super().__init__(f"`{field}` is not supported", param=field, hint=hint)


class TooManyPromptLogprobs(InvalidRequest):
    """The answer would tell more of the prompts than the gateway holds for one request."""

    code = "too_many_prompt_logprobs"
    hint = (
        "Send fewer or shorter prompts, a smaller n or fewer alternatives, "
        "or raise KILN_GATEWAY_MAX_PROMPT_LOGPROBS."
    )

    def __init__(self, num_tokens: int, num_per_token: int, limit: int, *, param: str) -> None:
        super().__init__(
            f"{num_tokens} prompt tokens, counted once a choice, with {num_per_token} log-probabilities each "
            f"are {num_tokens * num_per_token}, the limit is {limit}",
            param=param,
        )


class ModelNotFound(KilnError):
    """`model` is neither the base model's id nor an adapter that this key may see."""

    code = "model_not_found"
    kind = ErrorKind.NOT_FOUND
    param = "model"
    hint = "GET /v1/models lists the base model and every adapter."

    def __init__(self, model: str) -> None:
        # Clients of OpenAI's API show only the message.
        super().__init__(f"there is no model {model!r}; GET /v1/models lists those there are")


class GatewayStopping(Unavailable):
    """The gateway was told to stop before the answer was complete."""

    code = "gateway_stopping"
    hint = "Send the request again in a moment; a stream of job events resumes with Last-Event-ID."


class AnswerAborted(Unavailable):
    """The engine gave the answer up before its end; chat and text completions say finish_reason abort."""

    code = "answer_aborted"
    hint = "Send the request again."

    def __init__(self) -> None:
        super().__init__("the engine gave the answer up before its end")


class RolloutNotFound(KilnError):
    """No completion that this key may see is kept under this id any more."""

    code = "rollout_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = (
        "Rollouts are kept for KILN_GATEWAY_ROLLOUT_TTL_S seconds, for the key that made them, "
        'unless the request said "store": false. Sample again, or send the completion\'s text.'
    )


class OffPolicyRollout(InvalidRequest):
    """The rollout was not drawn from a distribution that training can score."""

    code = "off_policy_rollout"
    hint = "Sample with temperature > 0 and without penalties or logit_bias."


class HostNotAllowed(KilnError):
    """The request was sent to a name that this gateway does not answer to."""

    code = "host_not_allowed"
    kind = ErrorKind.FORBIDDEN
    hint = "Add the name to KILN_GATEWAY_ALLOWED_HOSTS."


class OriginNotAllowed(KilnError):
    """A web page of another origin sent the request, and its origin is not allowed."""

    code = "origin_not_allowed"
    kind = ErrorKind.FORBIDDEN
    hint = "Add the origin to KILN_GATEWAY_ALLOWED_ORIGINS."


class LimitsNeedRedis(ConfigurationError):
    """A key has limits, which are counted in Redis, and no Redis is configured."""

    code = "limits_need_redis"
    hint = "Set KILN_GATEWAY_REDIS_URL, or take the limits off the keys."


class AdapterPinned(KilnError):
    """Requests run on the version that is to be deleted."""

    code = "adapter_pinned"
    kind = ErrorKind.CONFLICT
    hint = "Try again when they have ended; nobody new is given the version once its name means another."

    def __init__(self, label: str, num_pins: int) -> None:
        super().__init__(f"{num_pins} running requests use {label}")
