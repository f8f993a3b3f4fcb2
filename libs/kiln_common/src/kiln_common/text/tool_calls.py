"""Tool calls in Qwen's XML form, read while the text arrives.

The outer tags are tokens of their own (kiln_common.text.marks); the inner ones are text.

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
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kiln_common.ids import new_id
from kiln_common.text.marks import Mark

_OPEN, _CLOSE = Mark.CALL_OPEN.value, Mark.CALL_CLOSE.value
_FUNCTION_START, _FUNCTION_END = "<function=", "</function>"
_PARAMETER_START, _PARAMETER_END = "<parameter=", "</parameter>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_NEXT_PART = re.compile(r"<parameter=([^>\n]+)>|</function>")
# Where the end of a value may begin.
_POSSIBLE_END = re.compile(r"\n?</?|\n")


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
    """Turns answer text into content and tool calls, argument by argument, strings piece by piece.

    `parameter_schemas`: for each function its parameters' JSON schemas by name; values of string
    parameters are taken as they stand, others are read as JSON. A tag inside a value counts only
    where the form goes on behind it. What does not follow the form is given back as content where no
    call had begun, and skipped inside one; a call may lack its last closing tags.
    """

    def __init__(self, parameter_schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = parameter_schemas
        self._state = _State.CONTENT
        self._buffer = ""
        self._base = 0  # characters before the buffer
        self._marks: deque[tuple[int, Mark]] = deque()  # ahead, by their place in all characters
        self._num_calls = 0
        self._function = ""
        self._parameter = ""
        self._num_parameters = 0
        self._scan_from = 0  # characters of the buffer known not to begin the end of a value
        self._is_value_begun = False  # past the line break before it
        self._is_string_open = False  # its quotation mark has been given out

    @property
    def num_calls(self) -> int:
        """Calls begun so far."""
        return self._num_calls

    def expect_mark(self, position: int, mark: Mark) -> None:
        """Announce that the mark begins at that place among all characters pushed from the start."""
        self._marks.append((position, mark))

    def push(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._advance(events):
            pass
        return events

    def finish(self, *, is_complete: bool) -> list[ToolEvent]:
        """What is still held back, now that nothing follows.

        A call without its last tags is ended if the answer `is_complete`; one that was cut off stays
        unfinished.
        """
        events: list[ToolEvent] = []
        rest = self._buffer
        match self._state:
            case _State.CONTENT if rest.strip():
                events.append(ContentText(rest))
            case _State.OPENED:
                events.append(ContentText(_OPEN + rest))
            case _State.VALUE:
                self._finish_value(is_complete, events)
            case _State.PARAMETERS if is_complete:
                self._end_call(events)
        self._drop(len(rest))
        return events

    def _finish_value(self, is_complete: bool, events: list[ToolEvent]) -> None:
        end, _ = self._find_end()
        value, rest = self._buffer[:end], self._buffer[end:]
        if is_complete or rest.removeprefix("\n").startswith(_PARAMETER_END):
            self._end_value(value if self._is_value_begun else value.removeprefix("\n"), events)
        if is_complete:
            self._end_call(events)

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

    def _drop(self, count: int) -> None:
        """Let go of the buffer's first characters and the marks in them."""
        self._buffer = self._buffer[count:]
        self._base += count
        while self._marks and self._marks[0][0] < self._base:
            self._marks.popleft()

    def _place_of(self, mark: Mark) -> int | None:
        """Where the next such mark begins in the buffer."""
        return next((place - self._base for place, found in self._marks if found is mark), None)

    def _mark_at(self, place: int) -> Mark | None:
        return next((mark for at, mark in self._marks if at == self._base + place), None)

    def _is_whole(self, place: int, mark: Mark) -> bool:
        return len(self._buffer) >= place + len(mark.value)

    def _read_content(self, events: list[ToolEvent]) -> bool:
        opening = self._place_of(Mark.CALL_OPEN)
        if opening is None or opening > len(self._buffer):
            certain = self._buffer.rstrip()  # white space before a call is none of the content's
            self._emit_content(certain, events)
            self._drop(len(certain))
            return False
        self._emit_content(self._buffer[:opening].rstrip(), events)
        self._drop(opening)
        if not self._is_whole(0, Mark.CALL_OPEN):
            return False
        self._drop(len(_OPEN))
        self._state = _State.OPENED
        return True

    def _emit_content(self, text: str, events: list[ToolEvent]) -> None:
        if text and (self._num_calls == 0 or text.strip()):
            events.append(ContentText(text))

    def _read_function(self, events: list[ToolEvent]) -> bool:
        found = _FUNCTION.match(self._buffer)
        if found is None:
            inside = self._buffer.lstrip()
            is_begun = inside.startswith(_FUNCTION_START) and not {">", "\n"} & set(inside)
            if is_begun or _FUNCTION_START.startswith(inside):
                return False
            events.append(ContentText(_OPEN))
            self._state = _State.CONTENT
            return True
        self._function = found.group(1).strip()
        self._num_parameters = 0
        events.append(ToolCallStarted(self._num_calls, new_id("call"), self._function))
        self._num_calls += 1
        self._drop(found.end())
        self._state = _State.PARAMETERS
        return True

    def _read_next_part(self, events: list[ToolEvent]) -> bool:
        found = _NEXT_PART.search(self._buffer)
        marks = [self._place_of(mark) for mark in (Mark.CALL_OPEN, Mark.CALL_CLOSE)]
        mark = min((place for place in marks if place is not None), default=None)
        if mark is not None and mark <= len(self._buffer) and (found is None or mark < found.start()):
            self._end_call(events)
            self._drop(mark)
            self._state = _State.CLOSING
            return True
        if found is None:
            return False
        self._drop(found.end())
        if found.group(1) is None:
            self._end_call(events)
            self._state = _State.CLOSING
        else:
            self._parameter, self._state = found.group(1).strip(), _State.VALUE
            self._scan_from, self._is_value_begun, self._is_string_open = 0, False, False
        return True

    def _read_value(self, events: list[ToolEvent]) -> bool:
        if not self._is_value_begun:
            if not self._buffer:
                return False
            self._drop(self._buffer.startswith("\n"))
            self._is_value_begun = True
        end, resume = self._find_end()
        if resume is not None:
            self._end_value(self._buffer[:end], events)
            self._drop(resume)
            self._state = _State.PARAMETERS
            return True
        if end and _allowed_types(self._schema()) == {"string"}:
            self._emit_string(self._buffer[:end], events)
            self._drop(end)
            end = 0
        self._scan_from = end
        return False

    def _find_end(self) -> tuple[int, int | None]:
        """Where the value ends and the form goes on; without the latter, up to where it is certain."""
        for possible in _POSSIBLE_END.finditer(self._buffer, self._scan_from):
            start = possible.start()
            is_end, resume = self._end_at(start)
            if is_end is not False:
                return start, resume
        return len(self._buffer), None

    def _end_at(self, start: int) -> tuple[bool | None, int | None]:
        """Whether the value ends here (None: not decided yet), and where the form goes on."""
        tag = start + self._buffer.startswith("\n", start)
        text = self._buffer[tag:]
        if self._mark_at(tag) is Mark.CALL_CLOSE:
            return self._end_without_tags(tag)
        followers: tuple[str, ...]
        for name, followers in (
            (_PARAMETER_END, (_PARAMETER_START, _FUNCTION_END)),
            (_FUNCTION_END, ()),  # only a mark
        ):
            if name.startswith(text):
                return None, None
            if not text.startswith(name):
                continue
            rest = text[len(name) :].lstrip()
            if not rest:
                return None, None
            mark = self._mark_at(len(self._buffer) - len(rest))
            for follower in followers if mark is None else (mark.value,):
                if rest.startswith(follower):
                    return True, tag + len(name) if name == _PARAMETER_END else tag
                if follower.startswith(rest):
                    return None, None
        return False, None

    def _end_without_tags(self, close: int) -> tuple[bool | None, int | None]:
        """The same where a call's closing mark stands in a value: nothing, or another call, follows."""
        rest = self._buffer[close + len(_CLOSE) :].lstrip()
        if not rest:
            return None, None
        is_call = self._mark_at(len(self._buffer) - len(rest)) is Mark.CALL_OPEN
        return (True, close) if is_call else (False, None)

    def _schema(self) -> Mapping[str, Any]:
        return self._schemas.get(self._function, {}).get(self._parameter) or {}

    def _key(self) -> str:
        opening = ", " if self._num_parameters else "{"
        return f"{opening}{json.dumps(self._parameter, ensure_ascii=False)}: "

    def _emit_string(self, text: str, events: list[ToolEvent]) -> None:
        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        opening = "" if self._is_string_open else self._key() + '"'
        self._is_string_open = True
        events.append(ToolArguments(self._num_calls - 1, opening + escaped))

    def _end_value(self, rest: str, events: list[ToolEvent]) -> None:
        if self._is_string_open:
            fragment = json.dumps(rest, ensure_ascii=False)[1:]
        else:
            fragment = self._key() + json.dumps(typed_value(rest, self._schema()), ensure_ascii=False)
        events.append(ToolArguments(self._num_calls - 1, fragment))
        self._num_parameters += 1

    def _end_call(self, events: list[ToolEvent]) -> None:
        index = self._num_calls - 1
        events.append(ToolArguments(index, "}" if self._num_parameters else "{}"))
        events.append(ToolCallFinished(index))

    def _read_close(self) -> bool:
        """Skip the closing tag; another call, or text, may stand in its place."""
        visible = len(self._buffer) - len(self._buffer.lstrip())
        if visible == len(self._buffer):
            return False
        if self._place_of(Mark.CALL_CLOSE) == visible:
            if not self._is_whole(visible, Mark.CALL_CLOSE):
                return False
            visible += len(_CLOSE)
            visible += len(self._buffer[visible:]) - len(self._buffer[visible:].lstrip())
        self._drop(visible)
        self._state = _State.CONTENT
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
