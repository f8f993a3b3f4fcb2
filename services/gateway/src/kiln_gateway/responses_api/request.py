"""A Responses request as a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiln_gateway.chat.translated import chat_body
from kiln_gateway.errors import InvalidField
from kiln_gateway.request_body import HINTS
from kiln_gateway.schemas.chat import ChatCompletionBody
from kiln_gateway.schemas.responses import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
)

# Where the fields of the chat request come from.
SOURCES = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
}
# Fields that mean the same in both.
_SAME = (
    *("model", "stream", "temperature", "top_p", "seed", "parallel_tool_calls"),
    *("adapter_policy", "store", "cache_salt", "priority", "chat_template_kwargs"),
)

Messages = list[dict[str, Any]]


def to_chat(body: ResponsesBody, history: Messages) -> ChatCompletionBody:
    """The same request in chat's words, after the conversation so far. Raises UnsupportedField, InvalidField."""
    body.refuse_unsupported()
    leading = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields |= {
        "messages": [*leading, *history, *input_messages(body.input)],
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "tools": _tools(body),
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _response_format(body),
    }
    if body.adapters is not None:
        fields["adapters"] = [adapter.model_dump() for adapter in body.adapters]
    chat = chat_body(fields)
    if "adapter" in body.model_fields_set:
        # Null means the bare base model here, where other fields' null means nothing.
        chat = chat.model_copy(update={"adapter": body.adapter})
    return chat


def input_messages(items: Sequence[InputItem]) -> Messages:
    """Items as chat messages: what an assistant thought, said and called becomes one message."""
    messages: Messages = []
    for item in items:
        if isinstance(item, FunctionOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": item.content})
        else:
            _add_to_turn(messages, item)
    return messages


def _add_to_turn(messages: Messages, item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    begins_turn = not messages or messages[-1]["role"] != "assistant"
    if isinstance(item, ReasoningItem):
        text = "".join(part.text for part in item.content or ())
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})
        return
    if begins_turn:
        messages.append({"role": "assistant", "content": ""})
    turn = messages[-1]
    if isinstance(item, MessageItem):
        turn["content"] += item.content
    else:
        call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        turn.setdefault("tool_calls", []).append(call)


def _tools(body: ResponsesBody) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    tools = []
    for tool in body.tools:
        function = tool.model_dump(exclude={"type"}, exclude_none=True)
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        message = f"`tool_choice` of type {choice.get('type')!r} is not supported"
        hint = 'Send "auto", "none", "required" or {"type": "function", "name": …}.'
        raise InvalidField("unsupported_tool", message, param="tool_choice", hint=hint)
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.schema_ is None or wanted.name is None:
        name = "schema" if wanted.schema_ is None else "name"
        raise InvalidField(
            "missing_field",
            f"`text.format.{name}` is missing",
            param="text.format",
            hint=HINTS["missing_field"],
        )
    schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}
