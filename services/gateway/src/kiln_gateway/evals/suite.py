"""A suite's text, one JSON object a line, as cases and back."""

from __future__ import annotations

import json
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from kiln_common.errors import KilnError
from kiln_gateway.evals.errors import InvalidSuite
from kiln_gateway.request_body import validate
from kiln_gateway.schemas.evals import MAX_CASES, EvalCaseFields, JsonSchemaScorer, RegexScorer


def parse_suite(text: str, *, param: str) -> list[EvalCaseFields]:
    """Every case. Blank lines are passed over, and count in the line numbers.

    Raises:
        InvalidSuite: with every wrong line by number, or that there are none or too many.
    """
    cases, problems = [], []
    # Not splitlines: a JSON string may hold other characters that end lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cases.append(_case(line))
        except KilnError as error:
            problems.append((number, str(error)))
        except ValueError as error:
            problems.append((number, str(error)))
        except RecursionError:
            problems.append((number, "nested too deeply"))
    if not cases and not problems:
        problems.append((1, "the suite has no case"))
    if len(cases) > MAX_CASES:
        problems.append((1, f"the suite has {len(cases)} cases, the limit is {MAX_CASES}"))
    if problems:
        raise InvalidSuite(problems, param=param)
    return cases


def to_jsonl(cases: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(case, ensure_ascii=False) for case in cases)


def _case(line: str) -> EvalCaseFields:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("there is a character that is not Unicode text") from None
    case = validate(fields, EvalCaseFields)
    if isinstance(case.scorer, RegexScorer):
        try:
            regex.compile(case.scorer.pattern)
        except regex.error as error:
            raise ValueError(f"scorer.pattern: {error}") from None
    if isinstance(case.scorer, JsonSchemaScorer):
        try:
            Draft202012Validator.check_schema(case.scorer.schema_)
        except SchemaError as error:
            raise ValueError(f"scorer.schema: {error.message}") from None
        _refuse_unsafe(case.scorer.schema_)
    return case


def _refuse_unsafe(schema: Any) -> None:
    """Refuse what would have to be fetched, and patterns that would get no time limit. Raises ValueError."""
    if isinstance(schema, list):
        for part in schema:
            _refuse_unsafe(part)
    if not isinstance(schema, dict):
        return
    for name in ("$ref", "$dynamicRef"):
        reference = schema.get(name)
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError("scorer.schema: only references within it are followed, those that begin with #")
    if "patternProperties" in schema:
        raise ValueError("scorer.schema: patternProperties is not supported, propertyNames with a pattern is")
    for part in schema.values():
        _refuse_unsafe(part)
