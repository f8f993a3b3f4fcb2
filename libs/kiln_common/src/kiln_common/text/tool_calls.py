"""Tool calls in Qwen's XML form, read while the text arrives.

<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kiln_common.ids import new_id
from kiln_common.text.stop_strings import longest_held_suffix

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION_END, _PARAMETER_END = "</function>", "</parameter>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>")
_NEXT_PART = re.compile(r"<parameter=([^>\n]+)>|</function>|</tool_call>")


@dataclass(frozen=True, slots=True)
class ContentText:
    """Answer text outside tool calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """The next piece of a call's arguments; the pieces of a finished call join to one JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallFinished:
    index: int


ToolEvent = ContentText | ToolCallStarted | ToolArguments | ToolCallFinished


class _State(Enum):
    CONTENT = 1
    OPENED = 2  # inside <tool_call>, before the function's name
    PARAMETERS = 3  # between parameters
    VALUE = 4
    CLOSING = 5  # past </function>, before </tool_call>


class ToolCallParser:
    """Turns answer text into content and tool calls, argument by argument.

    `parameter_schemas`: for each function its parameters' JSON schemas by name; values of string
    parameters are taken as they stand, others are read as JSON. What does not follow the form is
    given back as content where no call had begun, and skipped inside one.
    """

    def __init__(self, parameter_schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = parameter_schemas
        self._state = _State.CONTENT
        self._buffer = ""
        self._scan_from = 0  # characters of the buffer known not to begin the end of a value
        self._num_calls = 0
        self._function = ""
        self._parameter = ""
        self._num_parameters = 0

    @property
    def num_calls(self) -> int:
        """Calls begun so far."""
        return self._num_calls

    def push(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        """What is still held back, now that nothing follows; an unfinished call stays unfinished."""
        rest, self._buffer = self._buffer, ""
        if self._state is _State.CONTENT and rest.strip():
            return [ContentText(rest)]
        if self._state is _State.OPENED:
            return [ContentText(_OPEN + rest)]
        return []

    def _advance(self, events: list[ToolEvent]) -> bool:
        """Take one step on the buffer; False when it needs more text."""
        match self._state:
            case _State.CONTENT:
                return self._read_content(events)
            case _State.OPENED:
                return self._read_function(events)
            case _State.PARAMETERS:
                return self._read_next_part(events)
            case _State.VALUE:
                return self._read_value(events)
            case _State.CLOSING:
                return self._read_close()

    def _read_content(self, events: list[ToolEvent]) -> bool:
        before, mark, after = self._buffer.partition(_OPEN)
        if mark:
            self._emit_content(before.rstrip(), events)
            self._buffer, self._state = after, _State.OPENED
            return True
        num_held = longest_held_suffix(self._buffer, (_OPEN,))
        certain = self._buffer[: len(self._buffer) - num_held].rstrip()
        self._emit_content(certain, events)
        self._buffer = self._buffer[len(certain) :]
        return False

    def _emit_content(self, text: str, events: list[ToolEvent]) -> None:
        if text and (self._num_calls == 0 or text.strip()):
            events.append(ContentText(text))

    def _read_function(self, events: list[ToolEvent]) -> bool:
        found = _FUNCTION.search(self._buffer)
        close = self._buffer.find(_CLOSE)
        if close >= 0 and (found is None or close < found.start()):
            end = close + len(_CLOSE)
            events.append(ContentText(_OPEN + self._buffer[:end]))
            self._buffer, self._state = self._buffer[end:], _State.CONTENT
            return True
        if found is None:
            return False
        self._function = found.group(1).strip()
        self._num_parameters = 0
        events.append(ToolCallStarted(self._num_calls, new_id("call"), self._function))
        self._num_calls += 1
        self._buffer, self._state = self._buffer[found.end() :], _State.PARAMETERS
        return True

    def _read_next_part(self, events: list[ToolEvent]) -> bool:
        found = _NEXT_PART.search(self._buffer)
        if found is None:
            return False
        self._buffer = self._buffer[found.end() :]
        if found.group(1) is not None:
            self._parameter, self._scan_from, self._state = found.group(1).strip(), 0, _State.VALUE
            return True
        self._end_call(events)
        self._state = _State.CLOSING if found.group(0) == _FUNCTION_END else _State.CONTENT
        return True

    def _read_value(self, events: list[ToolEvent]) -> bool:
        end = self._buffer.find(_PARAMETER_END, self._scan_from)
        if end < 0:
            self._scan_from = max(0, len(self._buffer) - len(_PARAMETER_END) + 1)
            return False
        raw = self._buffer[:end].removeprefix("\n").removesuffix("\n")
        schema = self._schemas.get(self._function, {}).get(self._parameter)
        value = json.dumps(typed_value(raw, schema), ensure_ascii=False)
        opening = ", " if self._num_parameters else "{"
        key = json.dumps(self._parameter, ensure_ascii=False)
        events.append(ToolArguments(self._num_calls - 1, f"{opening}{key}: {value}"))
        self._num_parameters += 1
        self._buffer, self._state = self._buffer[end + len(_PARAMETER_END) :], _State.PARAMETERS
        return True

    def _end_call(self, events: list[ToolEvent]) -> None:
        index = self._num_calls - 1
        events.append(ToolArguments(index, "}" if self._num_parameters else "{}"))
        events.append(ToolCallFinished(index))

    def _read_close(self) -> bool:
        end = self._buffer.find(_CLOSE)
        if end < 0:
            return False
        self._buffer, self._state = self._buffer[end + len(_CLOSE) :].lstrip(), _State.CONTENT
        return True


_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def typed_value(raw: str, schema: Mapping[str, Any] | None) -> Any:
    """A parameter's value as its schema types it; text that fits no other type stays text."""
    types = _allowed_types(schema or {})
    if types == {"string"}:
        return raw
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(raw.strip().lower(), raw)
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        value = int(value)
    if not types:
        return value
    return value if any(_is_type(value, name) for name in types - {"string"}) else raw


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _PYTHON_TYPES.get(name, ()))


def _allowed_types(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types a schema names, its alternatives included; empty when it names none."""
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set(named or ())
    if "enum" in schema and not types and all(isinstance(value, str) for value in schema["enum"]):
        types = {"string"}
    for alternative in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        if isinstance(alternative, Mapping):
            types |= _allowed_types(alternative)
    return types
