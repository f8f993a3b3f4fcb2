"""Each scorer tells right from wrong, and an answer without the form it needs from both."""

import errno
import shutil
from typing import get_args

import pytest

from kiln_gateway.evals.code import program_of, score_code
from kiln_gateway.evals.errors import InvalidSuite
from kiln_gateway.evals.scorers import (
    Answer,
    ToolCall,
    score_contains,
    score_exact,
    score_json_schema,
    score_multiple_choice,
    score_numeric,
    score_regex,
    score_tool_call,
)
from kiln_gateway.evals.suite import parse_suite
from kiln_gateway.schemas.evals import (
    CodeScorer,
    ContainsScorer,
    ExactScorer,
    JsonSchemaScorer,
    MultipleChoiceScorer,
    NumericScorer,
    RegexScorer,
    Scorer,
    ToolCallScorer,
)
from tests.support.gateway import REPOSITORY

RIGHT, WRONG, INVALID = (1.0, True), (0.0, True), (0.0, False)


def verdict(score):
    return score.value, score.is_valid


@pytest.mark.parametrize(
    ("said", "ignore_case", "expected"),
    [
        (" Paris\n", False, RIGHT),
        ("paris", False, WRONG),
        ("paris", True, RIGHT),
        ("Paris.", False, WRONG),
        ("", False, WRONG),
    ],
)
def test_exact_compares_the_whole_answer(said, ignore_case, expected):
    scorer = ExactScorer(type="exact", target=["Paris", "Lutetia"], ignore_case=ignore_case)
    assert verdict(score_exact(scorer, Answer(said))) == expected


def test_contains_looks_for_any_target():
    scorer = ContainsScorer(type="contains", target=["thank you", "thanks"], ignore_case=True)
    assert verdict(score_contains(scorer, Answer("Many Thanks!"))) == RIGHT
    assert verdict(score_contains(scorer, Answer("No."))) == WRONG


def test_regex_searches_and_gives_up_in_time():
    assert verdict(score_regex(RegexScorer(type="regex", pattern=r"^\d+$"), Answer("42"))) == RIGHT
    assert verdict(score_regex(RegexScorer(type="regex", pattern=r"^\d+$"), Answer("42 eggs"))) == WRONG
    slow = score_regex(RegexScorer(type="regex", pattern=r"^(a|aa)+[bc]?$(?<=c)"), Answer("a" * 500))
    assert verdict(slow) == INVALID
    assert "took longer than 1 s" in slow.detail


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The sum is 12.", RIGHT),
        ("3 + 9 = 12", RIGHT),
        ("12 and then 13", WRONG),
        ("12.4", RIGHT),
        ("12.6", WRONG),
        ("1,012", WRONG),
        ("10-12", RIGHT),
        ("-12", WRONG),
        ("1.2e1", RIGHT),
        ("twelve", INVALID),
        ("...", INVALID),
    ],
)
def test_numeric_reads_the_last_number(said, expected):
    scorer = NumericScorer(type="numeric", target=12, tolerance=0.5)
    assert verdict(score_numeric(scorer, Answer(said))) == expected


def test_numeric_reads_thousands_and_allows_relative_error():
    scorer = NumericScorer(type="numeric", target=1_234_567, relative_tolerance=1e-6)
    assert verdict(score_numeric(scorer, Answer("about 1,234,567.5"))) == RIGHT


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", RIGHT),
        ("(B)", RIGHT),
        ("B. Oslo", RIGHT),
        ("**B**", RIGHT),
        ("The answer is B", RIGHT),
        ("Answer: C", WRONG),
        ("Oslo", RIGHT),
        ("A", WRONG),
        ("A nice question", INVALID),
        ("D", INVALID),
        ("I do not know", INVALID),
    ],
)
def test_multiple_choice_reads_a_letter(said, expected):
    scorer = MultipleChoiceScorer(type="multiple_choice", choices=["Bergen", "Oslo", "Rome"], answer=1)
    assert verdict(score_multiple_choice(scorer, Answer(said))) == expected


def test_json_schema_checks_the_form_and_the_target():
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    scorer = JsonSchemaScorer.model_validate({"type": "json_schema", "schema": schema, "target": {"age": 36}})
    assert verdict(score_json_schema(scorer, Answer('{"age": 36}'))) == RIGHT
    assert verdict(score_json_schema(scorer, Answer('{"age": 37}'))) == WRONG
    other = score_json_schema(scorer, Answer('{"age": "36"}'))
    assert verdict(other) == WRONG
    assert other.detail == "$.age: '36' is not of type 'integer'"
    assert verdict(score_json_schema(scorer, Answer("36 years"))) == INVALID
    assert verdict(score_json_schema(scorer, Answer("[" * 100_000))) == INVALID


def test_a_schemas_pattern_gives_up_in_time():
    schema = {"type": "string", "pattern": r"^(a|aa)+[bc]?$(?<=c)"}
    scorer = JsonSchemaScorer.model_validate({"type": "json_schema", "schema": schema})
    assert verdict(score_json_schema(scorer, Answer('"' + "a" * 500 + '"'))) == INVALID


def test_a_schema_that_cannot_be_used_makes_the_answer_invalid(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("something was fetched"))
    for schema, words in [
        ({"type": "string", "pattern": "("}, "missing )"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "#"}, "nested too deeply"),
        ({"$ref": "http://127.0.0.1:9/never/asked"}, "never/asked"),
    ]:
        scorer = JsonSchemaScorer.model_validate({"type": "json_schema", "schema": schema})
        score = score_json_schema(scorer, Answer('"text"'))
        assert verdict(score) == INVALID
        assert words in score.detail, score.detail


def test_a_line_ends_only_at_a_line_feed():
    case = '{"prompt": "a\u2028b\x85c", "scorer": {"type": "exact", "target": "x"}}'
    assert [found.prompt for found in parse_suite(f"{case}\r\n{case}", param="jsonl")] == [
        "a\u2028b\x85c"
    ] * 2


def test_a_tool_call_needs_its_name_and_arguments():
    scorer = ToolCallScorer(type="tool_call", name="weather", arguments={"city": "Oslo", "days": 1})
    call = ToolCall("weather", '{"days": 1.0, "city": "Oslo"}')
    assert verdict(score_tool_call(scorer, Answer("", (call,)))) == RIGHT
    for arguments in ('{"city": "Oslo"}', '{"city": "Oslo", "days": true}', '{"city": "Rome", "days": 1}'):
        assert verdict(score_tool_call(scorer, Answer("", (ToolCall("weather", arguments),)))) == WRONG
    assert verdict(score_tool_call(scorer, Answer("", (ToolCall("news", "{}"),)))) == WRONG
    assert verdict(score_tool_call(scorer, Answer("It rains."))) == INVALID
    assert verdict(score_tool_call(scorer, Answer("", (call, call)))) == INVALID


def test_code_is_the_fenced_blocks_or_all_of_the_answer():
    assert program_of("Here:\n```python\na = 1\n```\nand\n```\nb = 2\n```") == "a = 1\n\nb = 2\n"
    assert program_of("a = 1") == "a = 1"


def _fail(outer):
    shutil.rmtree(outer)
    raise OSError(errno.EIO, "Input/output error")


def test_code_passes_when_its_tests_do(sandbox, monkeypatch):
    scorer = CodeScorer(type="code", tests="assert double(4) == 8", time_limit_s=5.0)
    assert verdict(score_code(scorer, Answer("```python\ndef double(x):\n    return 2 * x\n```"))) == RIGHT
    wrong = score_code(scorer, Answer("```python\ndef double(x):\n    return x\n```"))
    assert verdict(wrong) == WRONG
    assert "AssertionError" in wrong.detail
    assert verdict(score_code(scorer, Answer("```python\n```"))) == INVALID
    # Deeper than a recursion, or a path, can follow.
    nested = "import os\nfor _ in range(1500):\n    os.mkdir('a' * 9)\n    os.chdir('a' * 9)"
    assert score_code(CodeScorer(type="code"), Answer(nested)).is_valid
    with monkeypatch.context() as patch:
        patch.setattr("kiln_common.sandbox.own_folder._remove", _fail)
        left = score_code(CodeScorer(type="code"), Answer("print(1)"))
    assert verdict(left) == INVALID
    assert "could not be removed" in left.detail
    endless = CodeScorer(type="code", time_limit_s=0.3)
    assert "the limit is 0.3" in score_code(endless, Answer("while True: pass")).detail


@pytest.fixture
def sandbox(tmp_path):
    from kiln_common.sandbox import Language, SandboxUnavailable, run

    try:
        run("", Language.SHELL, tmp_path)
    except SandboxUnavailable as error:
        pytest.skip(error.message)


def test_every_wrong_line_of_a_suite_is_named():
    lines = [
        '{"prompt": "Hi", "scorer": {"type": "exact", "target": "Hello"}}',
        "",
        "not json",
        '{"prompt": "Hi"}',
        '{"prompt": "Hi", "messages": [], "scorer": {"type": "exact", "target": "a"}}',
        '{"prompt": "Hi", "scorer": {"type": "guess"}}',
        '{"prompt": "Hi", "scorer": {"type": "regex", "pattern": "("}}',
        '{"prompt": "Hi", "scorer": {"type": "json_schema", "schema": {"type": "text"}}}',
        '{"prompt": "Hi", "scorer": {"type": "tool_call", "name": "weather"}}',
        '{"prompt": "Hi", "scorer": {"type": "multiple_choice", "choices": ["a", "b"], "answer": 2}}',
        "[1]",
        '{"prompt": "\\ud800", "scorer": {"type": "exact", "target": "a"}}',
        '{"prompt": "Hi", "scorer": {"type": "json_schema", "schema": {"items": {"$ref": "http://x/y"}}}}',
        '{"prompt": "Hi", "scorer": {"type": "json_schema", "schema": {"anyOf": [{"patternProperties": {}}]}}}',
    ]
    with pytest.raises(InvalidSuite) as caught:
        parse_suite("\n".join(lines), param="jsonl")
    message = str(caught.value)
    assert message.startswith("12 lines are wrong: line 3: not JSON")
    for number, words in [
        (4, "`scorer` is missing"),
        (5, "`messages` is empty"),
        (6, "scorer"),
        (7, "scorer.pattern: missing )"),
        (8, "scorer.schema: 'text' is not valid"),
        (9, "tools are missing"),
        (10, "answer is 2, the last choice is 1"),
        (11, "not an object"),
        (12, "a character that is not Unicode text"),
        (13, "only references within it are followed"),
        (14, "patternProperties is not supported"),
    ]:
        part = next(part for part in message.split("; ") if f"line {number}:" in part)
        assert words in part


def test_an_empty_suite_is_refused():
    with pytest.raises(InvalidSuite, match="has no case"):
        parse_suite("\n\n", param="jsonl")


def test_the_suite_in_the_documentation_has_every_scorer():
    page = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    cases = parse_suite(page.partition("```jsonl\n")[2].partition("```")[0], param="jsonl")
    assert {type(case.scorer) for case in cases} == set(get_args(get_args(Scorer)[0]))
