"""POST /v1/chat/completions, and the message type that training and tokenize share with it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.base import Body
from kiln_gateway.schemas.sampling import MAX_TOP_LOGPROBS, CompletionFields
from kiln_gateway.schemas.structured import ResponseFormat


def _join_text_parts(value: Any) -> Any:
    """Content as one string: a list of text parts is joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "Should be a string or a list of parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise PydanticCustomError(
                "unsupported_content", "a content part of type {kind} is not supported", {"kind": repr(kind)}
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_arguments(value: Any) -> Any:
    """Arguments as an object: OpenAI sends them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            raise PydanticCustomError("arguments_json", "Should be the JSON text of an object") from None
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments_json", "Should be the JSON text of an object")
    return value


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[dict[str, Any], BeforeValidator(_read_arguments)]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_text_parts)] = None
    name: str | None = Field(None, description="accepted without effect")
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Fields of OpenAI's own answers, so that an answer can be sent back as it came.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content is missing from a message of role {self.role}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls cannot be in a message of role {self.role}")
        return self

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates expect it; fields without a value are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def _refuse_empty(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty_messages", "`messages` is empty")
    return value


Messages = Annotated[list[ChatMessage], Field(max_length=16_384), BeforeValidator(_refuse_empty)]


class FunctionDefinition(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="every call's arguments follow the schema")


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition

    def to_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class ChatFields(CompletionFields):
    """Everything about a chat completion except its messages."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="of the model's own distribution: temperature 1, nothing filtered or forbidden"
    )
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(
        None, description="required and a named function are enforced by a grammar"
    )
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None,
        description="none: no thinking; minimal, low, medium: at most 256, 1,024, 4,096 tokens of it;"
        " high, xhigh: as much as the model likes",
    )
    thinking_budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="most tokens of thinking before its end is forced; goes before reasoning_effort"
    )
    chat_template_kwargs: dict[str, Any] | None = None
    # OpenAI's, refused by name in refuse_unsupported.
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    verbosity: str | None = None
    moderation: Any = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None

    @property
    def num_top_logprobs(self) -> int:
        return self.top_logprobs or 0

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def active_tools(self) -> list[Tool]:
        """The tools the model is told about."""
        return [] if self.tool_choice == "none" else self.tools or []

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for name in ("audio", "prediction", "web_search_options", "verbosity", "moderation"):
            if getattr(self, name) is not None:
                raise UnsupportedField(name)
        for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(self, name) is not None:
                raise UnsupportedField(name, f"Send `{instead}` instead.")
        if self.modalities not in (None, ["text"]):
            raise UnsupportedField("modalities", 'Only ["text"] is offered.')

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatFields:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens};"
                " they mean the same"
            )
        return self


class ChatCompletionBody(ChatFields):
    messages: Messages
