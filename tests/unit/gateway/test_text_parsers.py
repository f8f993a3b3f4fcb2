"""Stop strings, reasoning and tool calls come out the same however the text is cut."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln_common.text.marks import Mark
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


def test_a_stop_string_that_comes_too_early_is_text():
    matcher = StopStringMatcher(["END"])
    early = [matcher.push(piece, is_early=True) for piece in ("a EN", "D E", "ND E")]
    late = [matcher.push(piece) for piece in ("ND b",)]
    assert early + late == ["a ", "END ", "END ", ""]  # the third began too early, and ended in time
    assert matcher.matched == "END"


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 20),
)
def test_a_stop_string_counts_from_where_it_ends(text, stops, num_early):
    matcher = StopStringMatcher(stops)
    found = "".join(matcher.push(character, is_early=i < num_early) for i, character in enumerate(text))
    ends = [end for end in range(num_early + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    if not ends:
        assert (found + matcher.finish(), matcher.matched) == (text, None)
    else:
        assert matcher.matched is not None
        assert (found + matcher.matched) == text[: min(ends)]


MARKS = re.compile("(" + "|".join(re.escape(mark.value) for mark in Mark) + ")")


def marked(
    text: str, cuts: list[int] | None = None, *, spelled_out: bool = False
) -> list[tuple[str, Mark | None]]:
    """The text in pieces, its marks as tokens of their own, or spelled out like other text."""
    if spelled_out:
        return [(piece, None) for piece in cut(text, cuts or [])]
    pieces: list[tuple[str, Mark | None]] = []
    for part in filter(None, MARKS.split(text)):
        mark = next((mark for mark in Mark if mark.value == part), None)
        pieces += [(part, mark)] if mark else [(piece, None) for piece in cut(part, cuts or [])]
    return pieces


def split(pieces: list[tuple[str, Mark | None]], **options) -> tuple[str, str]:
    splitter = ReasoningSplitter(**options)
    parts = [*(splitter.push(*piece) for piece in pieces), splitter.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.answer for p in parts)


@settings(max_examples=80, deadline=None)
@given(CUTS)
def test_reasoning_and_answer_come_apart_without_marks_and_blank_lines(cuts):
    text = "I add.\n\nThen < think / again.\n</think>\n\nIt is 4.\n\nReally </think> so."
    expected = ("I add.\n\nThen < think / again.", "It is 4.\n\nReally </think> so.")
    assert split(marked(text, cuts), starts_in_reasoning=True) == expected
    assert split(marked("<think>\n" + text, cuts), starts_in_reasoning=False) == expected


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_a_mark_that_is_only_spelled_out_ends_nothing(cuts):
    text = "I would write </think> to end it.\n<tool_call>\n<function=add>\nor so"
    options = {"starts_in_reasoning": True, "call_names": ["add"]}
    assert split(marked(text, cuts, spelled_out=True), **options) == (text, "")
    assert split(marked("<think>x</think>y", cuts, spelled_out=True), starts_in_reasoning=False) == (
        "",
        "<think>x</think>y",
    )


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_a_call_inside_unfinished_thinking_ends_it(cuts):
    call = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    options = {"starts_in_reasoning": True, "call_names": ["add"]}
    assert split(marked("I need to add.\n\n" + call, cuts), **options) == ("I need to add.", call)


@pytest.mark.parametrize(
    "thought",
    [
        "A call opens with <tool_call> and then the function.",
        "<tool_call>\n<function=other>\n</function>\n</tool_call> is none of mine.",
        "It is <tool_call>\n<funct",
        "Twice <tool_call><tool_call>",
    ],
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CUTS)
def test_what_is_no_call_of_a_known_function_stays_thinking(thought, cuts):
    options = {"starts_in_reasoning": True, "call_names": ["add"]}
    assert split(marked(thought, cuts), **options) == (thought, "")
    assert split(marked(thought + "\n</think>\n\nDone.", cuts), **options) == (thought, "Done.")


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_a_certain_separator_leaves_the_answers_own_line_breaks(cuts):
    pieces = marked("x\n</think>\n\n\n\nanswer", cuts)
    assert split(pieces, starts_in_reasoning=True, separator="\n\n") == ("x", "\n\nanswer")
    assert split(pieces, starts_in_reasoning=True) == ("x", "answer")


def test_an_answer_without_a_block_is_all_answer():
    assert split(marked(" <b>hi</b>", [1, 2]), starts_in_reasoning=False) == ("", " <b>hi</b>")


def test_a_block_that_never_closes_is_all_reasoning():
    assert split(marked("I wonder </thi"), starts_in_reasoning=True) == ("I wonder </thi", "")


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


def events_of(pieces: list[tuple[str, Mark | None]], *, is_complete: bool = True):
    parser = ToolCallParser(SCHEMAS)
    events, position = [], 0
    for text, mark in pieces:
        if mark is not None:
            parser.expect_mark(position, mark)
        position += len(text)
        events += parser.push(text)
    return events + parser.finish(is_complete=is_complete)


def parsed(pieces: list[tuple[str, Mark | None]], **options) -> tuple[str, list[tuple[str, str]], int]:
    events = events_of(pieces, **options)
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
    content, calls, num_finished = parsed(marked(TWO_CALLS, cuts))
    assert content == "Let me look."
    assert num_finished == 2
    assert [name for name, _ in calls] == ["weather", "add"]
    assert json.loads(calls[0][1]) == {"city": "New\nYork", "days": 3, "units": "c"}
    assert json.loads(calls[1][1]) == {"a": 1.5, "b": None, "tags": ["x", "ü"]}


def call_with(city: str) -> str:
    return (
        f"<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"
    )


def test_arguments_stream_one_by_one_and_strings_piece_by_piece():
    texts = [call_with('one "two"\nthree')[:n] for n in (46, 54, 58, 61)]
    pieces = marked(texts[0]) + [(b[len(a) :], None) for a, b in pairwise(texts)]
    fragments = [event.fragment for event in events_of(pieces, is_complete=False)[1:]]
    assert "".join(fragments) == '{"city": "one \\"two\\"\\nthr'
    assert len(fragments) == 3


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\n",
        "if a < b:\n    print('</parameter>')",
        "<parameter=city>\nnested\n</parameter>\nand on",
        "</function>\n</tool>",
        "see </tool_call> there",
        "<tool_call>\n<function=x>\n",
        "a\n</param",
        '"quoted" \\ ü \t',
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CUTS)
def test_what_merely_looks_like_a_tag_is_part_of_the_value(value, cuts):
    content, [(_, arguments)], num_finished = parsed(marked(call_with(value), cuts))
    assert (content, json.loads(arguments), num_finished) == ("", {"city": value}, 1)


@pytest.mark.parametrize(
    "end",
    [
        "\n</parameter>\n</function>\n",
        "\n</parameter>\n</function>",
        "\n</parameter>\n",
        "\n</parameter>",
        "\n</param",
        "\n</function>\n</tool_call>",
        "\n</function>",
        "\n</tool_call>",
        "\n",
        "",
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CUTS)
def test_a_complete_answer_may_lack_its_last_closing_tags(end, cuts):
    text = call_with("Oslo").removesuffix("\n</parameter>\n</function>\n</tool_call>") + end
    _, [(_, arguments)], num_finished = parsed(marked(text, cuts))
    assert (json.loads(arguments)["city"].rstrip("\n"), num_finished) == ("Oslo", 1)


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_a_call_that_forgot_its_end_ends_where_the_next_begins(cuts):
    forgotten = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n"
    for first in (forgotten, forgotten + "</function>\n", forgotten + "</tool_call>\n"):
        content, calls, num_finished = parsed(marked(first + call_with("Oslo") + "\nDone.", cuts))
        assert calls == [("weather", '{"days": 3}'), ("weather", '{"city": "Oslo"}')]
        assert (content.strip(), num_finished) == ("Done.", 2)


def test_a_call_without_parameters_has_an_empty_object():
    assert parsed(marked("<tool_call>\n<function=now>\n</function>\n</tool_call>"))[1] == [("now", "{}")]


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_what_is_no_call_comes_back_as_content(cuts):
    text = 'See <tool_call>{"name": "x"}</tool_call> and <tool_call>\n<function=x\n> and <tool_ca'
    content, calls, _ = parsed(marked(text, cuts))
    assert not calls
    assert re.sub(r"\s", "", content) == re.sub(r"\s", "", text)


@settings(max_examples=40, deadline=None)
@given(CUTS)
def test_a_call_that_is_only_spelled_out_is_content(cuts):
    content, calls, _ = parsed(marked(TWO_CALLS, cuts, spelled_out=True))
    assert (content, calls) == (TWO_CALLS, [])


def test_an_answer_that_was_cut_off_leaves_its_call_unfinished():
    whole = TWO_CALLS[: TWO_CALLS.index("<parameter=units>")]
    _, calls, num_finished = parsed(marked(whole), is_complete=False)
    assert (calls, num_finished) == ([("weather", '{"city": "New\\nYork", "days": 3')], 0)
    _, calls, num_finished = parsed(marked(whole[: whole.index("York")]), is_complete=False)
    assert (calls, num_finished) == ([("weather", '{"city": "New')], 0)


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
