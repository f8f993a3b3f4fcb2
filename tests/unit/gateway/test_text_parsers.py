"""Stop strings, reasoning and tool calls come out the same however the text is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln_common.text.reasoning import ReasoningSplitter, opens_reasoning
from kiln_common.text.stop_strings import StopStringMatcher
from kiln_common.text.tool_calls import (
    ContentText,
    ToolArguments,
    ToolCallFinished,
    ToolCallParser,
    ToolCallStarted,
    typed_value,
)


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


CUTS = st.lists(st.integers(0, 10_000), max_size=60)


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops)
    text = "".join(map(matcher.push, pieces))
    return text + (matcher.finish() if matcher.matched is None else ""), matcher.matched


@settings(max_examples=80, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), CUTS)
def test_text_ends_before_the_first_stop_string(text, stops, cuts):
    found, matched = stopped([*text], stops)
    if matched is None:
        assert found == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(found + matched)
    whole, _ = stopped(cut(text, cuts), stops)
    assert text.startswith(whole)
    assert (matched is None) == (whole == text and not any(stop in text for stop in stops))


def test_text_that_may_become_a_stop_string_waits():
    matcher = StopStringMatcher(["END"])
    assert [matcher.push(piece) for piece in ("a E", "N", "x", " EN", "D!")] == ["a ", "", "ENx", " ", ""]
    assert matcher.matched == "END"


def split(pieces: list[str], *, starts_in_reasoning: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(starts_in_reasoning=starts_in_reasoning)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.answer for p in parts)


@settings(max_examples=80, deadline=None)
@given(CUTS)
def test_reasoning_and_answer_come_apart_without_marks_and_blank_lines(cuts):
    text = "I add.\n\nThen < think / again.\n</think>\n\nIt is 4.\n\nReally </think> so."
    expected = ("I add.\n\nThen < think / again.", "It is 4.\n\nReally </think> so.")
    assert split(cut(text, cuts), starts_in_reasoning=True) == expected
    assert split(cut("<think>\n" + text, cuts), starts_in_reasoning=False) == expected


def test_an_answer_without_a_block_is_all_answer():
    assert split([*" <b>hi</b>"], starts_in_reasoning=False) == ("", " <b>hi</b>")


def test_a_block_that_never_closes_is_all_reasoning():
    assert split(["I wonder </thi"], starts_in_reasoning=True) == ("I wonder </thi", "")


@pytest.mark.parametrize(
    ("turn", "is_open"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)]
)
def test_only_the_last_turn_says_whether_thinking_is_open(turn, is_open):
    prompt = "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    assert opens_reasoning(prompt + turn) is is_open


SCHEMAS = {
    "weather": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["c", "f"]}},
    "add": {"a": {"type": "number"}, "b": {"type": ["number", "null"]}, "tags": {"type": "array"}},
}
TWO_CALLS = """Let me look.

<tool_call>
<function=weather>
<parameter=city>
New
York
</parameter>
<parameter=days>
3
</parameter>
<parameter=units>
c
</parameter>
</function>
</tool_call>
<tool_call>
<function=add>
<parameter=a>
1.5
</parameter>
<parameter=b>
null
</parameter>
<parameter=tags>
["x", "ü"]
</parameter>
</function>
</tool_call>"""


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, str]], int]:
    parser = ToolCallParser(SCHEMAS)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    content = "".join(event.text for event in events if isinstance(event, ContentText))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStarted):
            calls.append((event.name, ""))
        elif isinstance(event, ToolArguments):
            name, arguments = calls[event.index]
            calls[event.index] = (name, arguments + event.fragment)
    return content, calls, sum(isinstance(event, ToolCallFinished) for event in events)


@settings(max_examples=80, deadline=None)
@given(CUTS)
def test_calls_and_content_do_not_depend_on_where_the_text_is_cut(cuts):
    content, calls, num_finished = parsed(cut(TWO_CALLS, cuts))
    assert content == "Let me look."
    assert num_finished == 2
    assert [name for name, _ in calls] == ["weather", "add"]
    assert json.loads(calls[0][1]) == {"city": "New\nYork", "days": 3, "units": "c"}
    assert json.loads(calls[1][1]) == {"a": 1.5, "b": None, "tags": ["x", "ü"]}


def test_arguments_stream_one_by_one():
    parser = ToolCallParser(SCHEMAS)
    head = parser.push("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>")
    assert isinstance(head[0], ToolCallStarted)
    assert head[1] == ToolArguments(0, '{"a": 1')


def test_a_call_without_parameters_has_an_empty_object():
    assert parsed(["<tool_call>\n<function=now>\n</function>\n</tool_call>"])[1] == [("now", "{}")]


def test_what_is_no_call_comes_back_as_content():
    text = 'See <tool_call>{"name": "x"}</tool_call> and <tool_ca'
    content, calls, _ = parsed([*text])
    assert not calls
    assert content.replace(" ", "") == text.replace(" ", "")


def test_an_unfinished_call_is_not_finished():
    _, calls, num_finished = parsed([TWO_CALLS[: TWO_CALLS.index("<parameter=units>")]])
    assert (calls, num_finished) == ([("weather", '{"city": "New\\nYork", "days": 3')], 0)


@pytest.mark.parametrize(
    ("raw", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12.0", {"type": "integer"}, 12),
        ("twelve", {"type": "integer"}, "twelve"),
        ("True", {"type": "boolean"}, True),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": ["string", "null"]}, None),
        ("7", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 7),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("NaN", {"type": "number"}, "NaN"),
        ('{"a": 1}', None, {"a": 1}),
        ("plain words", None, "plain words"),
    ],
)
def test_values_take_their_schemas_type(raw, schema, value):
    found = typed_value(raw, schema)
    assert found == value
    assert type(found) is type(value)
