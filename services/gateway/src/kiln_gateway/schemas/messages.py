"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.base import Body, Reference, StopStrings
from kiln_gateway.schemas.sampling import ComposedAdapter

_NO_EFFECT = "accepted without effect"
_BLOCKS = ("text", "thinking", "tool_use", "tool_result")


def _to_blocks(value: Any) -> Any:
    """Content as a list of blocks: a string is one block of text."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    for block in value if isinstance(value, list) else ():
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind not in _BLOCKS:
            raise PydanticCustomError(
                "unsupported_content", "a content block of type {kind} is not supported", {"kind": repr(kind)}
            )
    return value


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description=_NO_EFFECT)
    citations: Any = Field(None, description=_NO_EFFECT)


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description=_NO_EFFECT)


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]
    caller: Any = Field(None, description=_NO_EFFECT)
    cache_control: Any = Field(None, description=_NO_EFFECT)


Texts = Annotated[list[TextBlock], BeforeValidator(_to_blocks)]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool | None = Field(None, description=_NO_EFFECT)
    cache_control: Any = Field(None, description=_NO_EFFECT)


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[ContentBlock], BeforeValidator(_to_blocks)]


def _refuse_empty(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty_messages", "`messages` is empty")
    return value


class InputTool(Body):
    """A tool of the caller's own."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    cache_control: Any = Field(None, description=_NO_EFFECT)
    eager_input_streaming: bool | None = Field(
        None, description="accepted without effect: it is always eager"
    )
    input_examples: list[dict[str, Any]] | None = Field(None, description=_NO_EFFECT)


class InputToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = Field(None, description=_NO_EFFECT)
    format: OutputFormat | None = None


class CountTokensBody(Body):
    """What decides how many tokens a prompt has."""

    model: Reference | None = Field(None, description="base model id, adapter name or name@version")
    messages: Annotated[list[InputMessage], BeforeValidator(_refuse_empty)] = Field(
        description="the last one is not the assistant's: to go on from one is not built yet"
    )
    system: Texts | None = None
    tools: Annotated[list[InputTool], Field(max_length=128)] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = Field(None, description="without it the model does not think")
    output_config: OutputConfig | None = None
    cache_control: Any = Field(None, description=_NO_EFFECT)
    speed: str | None = Field(None, description=_NO_EFFECT)
    user_profile_id: str | None = Field(None, description=_NO_EFFECT)
    workspace_id: str | None = Field(None, description=_NO_EFFECT)
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: StopStrings = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    metadata: dict[str, Any] | None = Field(None, description=_NO_EFFECT)
    service_tier: str | None = Field(None, description=_NO_EFFECT)
    inference_geo: str | None = Field(None, description=_NO_EFFECT)
    diagnostics: dict[str, Any] | None = Field(None, description=_NO_EFFECT)
    # Kiln's own.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    adapter: Reference | None = None
    adapters: Annotated[list[ComposedAdapter], Field(min_length=1, max_length=8)] | None = None
    adapter_policy: Literal["pin", "latest"] | None = None
    store: bool | None = Field(None, description="false keeps no rollout")
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    # Anthropic's, refused by name.
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedField."""
        for name in ("container", "mcp_servers", "context_management"):
            if getattr(self, name) is not None:
                raise UnsupportedField(name)
