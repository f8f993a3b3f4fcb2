"""A Messages request as a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kiln_common.errors import NotBuiltYet
from kiln_gateway.chat.translated import chat_body
from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.chat import ChatCompletionBody
from kiln_gateway.schemas.messages import (
    CountTokensBody,
    InputMessage,
    InputToolChoice,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

# Where the fields of the chat request come from.
SOURCES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "thinking_budget_tokens": "thinking.budget_tokens",
    "reasoning_effort": "thinking",
    "max_completion_tokens": "max_tokens",
    "parallel_tool_calls": "tool_choice",
}
# Fields that mean the same in both.
_SAME = (
    *("stream", "max_tokens", "temperature", "top_p", "top_k", "seed"),
    *("adapter_policy", "store", "cache_salt", "priority"),
)
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: CountTokensBody) -> ChatCompletionBody:
    """The same request in chat's words. Raises UnsupportedField, InvalidField, NotBuiltYet."""
    if body.messages[-1].role == "assistant":
        raise NotBuiltYet(
            "`messages` ends with an assistant's message; to go on from one is not built yet",
            param="messages",
            hint="End with a user's message; a form of answer is better asked for by output_config.format.",
        )
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": list(_messages(body)),
        "tools": _tools(body),
        "tool_choice": _tool_choice(body.tool_choice),
        "chat_template_kwargs": body.chat_template_kwargs,
        **_thinking(body),
    }
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if isinstance(body, MessagesBody):
        body.refuse_unsupported()
        fields |= {name: getattr(body, name) for name in _SAME}
        fields["stop"] = body.stop_sequences
        if body.adapters is not None:
            fields["adapters"] = [adapter.model_dump() for adapter in body.adapters]
        if body.output_config is not None and body.output_config.format is not None:
            schema = {"name": "answer", "schema": body.output_config.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    chat = chat_body(fields)
    if isinstance(body, MessagesBody) and "adapter" in body.model_fields_set:
        # Null means the bare base model here, where other fields' null means nothing.
        chat = chat.model_copy(update={"adapter": body.adapter})
    return chat


def _messages(body: CountTokensBody) -> Iterator[dict[str, Any]]:
    if body.system:
        yield {"role": "system", "content": _joined(body.system)}
    for message in body.messages:
        if message.role == "assistant":
            yield _assistant_message(message)
        else:
            yield from _other_messages(message)


def _assistant_message(message: InputMessage) -> dict[str, Any]:
    calls = [block for block in message.content if isinstance(block, ToolUseBlock)]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    thinking = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    chat: dict[str, Any] = {"role": "assistant", "content": _joined(texts)}
    if thinking:
        chat["reasoning_content"] = "".join(thinking)
    if calls:
        chat["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.input}} for call in calls
        ]
    return chat


def _other_messages(message: InputMessage) -> Iterator[dict[str, Any]]:
    """A user's message, cut where a tool's result stands in it."""
    texts: list[TextBlock] = []
    has_results = False
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": message.role, "content": _joined(texts)}
            texts, has_results = [], True
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)}
    if texts or not has_results:
        yield {"role": message.role, "content": _joined(texts)}


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "".join(block.text for block in blocks)


def _tools(body: CountTokensBody) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    tools = []
    for tool in body.tools:
        function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
        if tool.description is not None:
            function["description"] = tool.description
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(choice: InputToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise UnsupportedField("tool_choice", 'A choice of type "tool" needs the name of the tool.')
        return {"type": "function", "function": {"name": choice.name}}
    return _TOOL_CHOICES[choice.type]


def _thinking(body: CountTokensBody) -> dict[str, Any]:
    """As Anthropic's API has it, a request that says nothing about thinking gets none."""
    thinking = body.thinking
    if thinking is None or thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    if thinking.type == "adaptive":
        return {}
    return {"reasoning_effort": "high", "thinking_budget_tokens": thinking.budget_tokens}
