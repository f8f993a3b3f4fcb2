"""POST /v1/responses, in OpenAI's newer shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.base import Body, Reference
from kiln_gateway.schemas.sampling import ComposedAdapter

_NO_EFFECT = "accepted without effect"
_TEXT_PARTS = ("input_text", "output_text", "text")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _join_parts(value: Any) -> Any:
    """Content as one string: a list of text parts is joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "unsupported_content", "a content part of type {kind} is not supported", {"kind": repr(kind)}
            )
        texts.append(part["text"])
    return "".join(texts)


def _to_items(value: Any) -> Any:
    """Input as a list of items: a string is one message of the user, and a message may leave out its type."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "Should be a string or a list of items")
    if not value:
        raise PydanticCustomError("empty_messages", "`input` is empty")
    items = []
    for item in value:
        if isinstance(item, dict) and "type" not in item and "role" in item:
            item = {"type": "message", **item}
        kind = item.get("type") if isinstance(item, dict) else type(item).__name__
        if kind not in _ITEMS:
            raise PydanticCustomError(
                "unsupported_content", "an input item of type {kind} is not supported", {"kind": repr(kind)}
            )
        items.append(item)
    return items


Joined = Annotated[str, BeforeValidator(_join_parts)]


class MessageItem(Body):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Joined
    id: str | None = Field(None, description=_NO_EFFECT)
    status: str | None = Field(None, description=_NO_EFFECT)
    phase: str | None = Field(None, description=_NO_EFFECT)


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    id: str | None = Field(None, description=_NO_EFFECT)
    status: str | None = Field(None, description=_NO_EFFECT)
    namespace: str | None = Field(None, description=_NO_EFFECT)
    caller: Any = Field(None, description=_NO_EFFECT)


class FunctionOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Joined
    id: str | None = Field(None, description=_NO_EFFECT)
    status: str | None = Field(None, description=_NO_EFFECT)
    caller: Any = Field(None, description=_NO_EFFECT)


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[Any] | None = Field(None, description=_NO_EFFECT)
    encrypted_content: str | None = Field(None, description=_NO_EFFECT)
    id: str | None = Field(None, description=_NO_EFFECT)
    status: str | None = Field(None, description=_NO_EFFECT)


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem, Field(discriminator="type")
]


def _refuse_built_in(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and kind != "function":
        raise PydanticCustomError(
            "unsupported_tool", "a tool of type {kind} is not supported", {"kind": repr(kind)}
        )
    return value


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = Field(
        None, description="accepted without effect: the thinking itself is in `content`"
    )
    generate_summary: str | None = Field(None, description=_NO_EFFECT)


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


# Documented by OpenAI and refused by name, each with what to do instead.
_REFUSED = {
    "background": "Stream the response, or wait for it.",
    "context_management": "Shorten the conversation on your side.",
    "conversation": "previous_response_id continues a conversation.",
    "image": "The model reads and writes text.",
    "moderation": "Check the text on your side.",
    "prompt": "Send the text in `instructions` and `input`.",
    "access_programs": "Leave the field out.",
}


class ResponsesBody(Body):
    input: Annotated[list[InputItem], BeforeValidator(_to_items)]
    model: Reference | None = Field(None, description="base model id, adapter name or name@version")
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = Field(None, description=_NO_EFFECT)
    store: bool | None = Field(None, description="false keeps neither the response nor a rollout")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: (
        Annotated[list[Annotated[FunctionTool, BeforeValidator(_refuse_built_in)]], Field(max_length=128)]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        None, description="accepted without effect: it counts calls of built-in tools"
    )
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(None, description=_NO_EFFECT)
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = Field(None, description=_NO_EFFECT)
    service_tier: str | None = Field(None, description=_NO_EFFECT)
    safety_identifier: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_retention: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=_NO_EFFECT)
    background: bool | None = None
    context_management: list[Any] | None = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: dict[str, Any] | None = None
    access_programs: Any = None
    # Kiln's own.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    adapter: Reference | None = None
    adapters: Annotated[list[ComposedAdapter], Field(min_length=1, max_length=8)] | None = None
    adapter_policy: Literal["pin", "latest"] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedField."""
        for name, hint in _REFUSED.items():
            if getattr(self, name):
                raise UnsupportedField(name, hint)
        if self.truncation == "auto":
            raise UnsupportedField("truncation", "Shorten the input; a longer one than fits is refused.")
        if self.top_logprobs:
            raise UnsupportedField("top_logprobs", "POST /v1/chat/completions gives log-probabilities.")
        if self.text is not None and self.text.verbosity is not None:
            raise UnsupportedField("text.verbosity", "Say in the instructions how long an answer should be.")

    @model_validator(mode="after")
    def _has_stream_for_its_options(self) -> ResponsesBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self
