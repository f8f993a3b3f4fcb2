"""How an answer is scored, by rules alone: from 0 (wrong) to 1 (right).

An answer that has not the form a scorer needs (no number, no letter, no JSON, no call) is invalid
and counts as wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from jsonschema_specifications import REGISTRY as SPECIFICATIONS
from referencing.exceptions import Unresolvable

from kiln_gateway.schemas.evals import (
    ContainsScorer,
    ExactScorer,
    JsonSchemaScorer,
    MultipleChoiceScorer,
    NumericScorer,
    RegexScorer,
    ToolCallScorer,
)

_REGEX_LIMIT_S = 1.0
_NUMBER = regex.compile(r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # JSON text, as the model wrote it


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, without its thinking."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    value: float
    is_valid: bool = True
    detail: str = field(default="")


def invalid(detail: str) -> Score:
    return Score(0.0, is_valid=False, detail=detail)


def _verdict(is_right: bool, detail: str = "") -> Score:
    return Score(float(is_right), detail=detail)


def score_exact(scorer: ExactScorer, answer: Answer) -> Score:
    said = _folded(answer.text.strip(), scorer.ignore_case)
    return _verdict(any(said == _folded(target.strip(), scorer.ignore_case) for target in scorer.target))


def score_contains(scorer: ContainsScorer, answer: Answer) -> Score:
    said = _folded(answer.text, scorer.ignore_case)
    return _verdict(any(_folded(target, scorer.ignore_case) in said for target in scorer.target))


def _folded(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def score_regex(scorer: RegexScorer, answer: Answer) -> Score:
    flags = regex.IGNORECASE if scorer.ignore_case else 0
    try:
        return _verdict(_search(scorer.pattern, answer.text, flags))
    except TimeoutError:
        return invalid(f"the pattern took longer than {_REGEX_LIMIT_S:g} s on this answer")


def score_numeric(scorer: NumericScorer, answer: Answer) -> Score:
    numbers = [found for found in _NUMBER.findall(answer.text) if any(c.isdigit() for c in found)]
    if not numbers:
        return invalid("there is no number in the answer")
    number = float(numbers[-1].replace(",", ""))
    is_right = math.isclose(
        number, scorer.target, rel_tol=scorer.relative_tolerance, abs_tol=scorer.tolerance
    )
    return _verdict(is_right, f"read as {number:g}")


def choices_text(scorer: MultipleChoiceScorer) -> str:
    """What is added to the question."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, scorer.choices, strict=False)]
    return "\n\n" + "\n".join(lines) + "\n\nAnswer with the letter of the right choice."


def score_multiple_choice(scorer: MultipleChoiceScorer, answer: Answer) -> Score:
    chosen = _chosen_letter(answer.text.strip(), scorer.choices)
    if chosen is None:
        return invalid("the answer names no choice")
    return _verdict(chosen == LETTERS[scorer.answer], f"read as {chosen}")


def _chosen_letter(text: str, choices: list[str]) -> str | None:
    """The letter an answer begins with or declares, or that of the choice it repeats."""
    letters = LETTERS[: len(choices)]
    alone = regex.match(rf"[(*\[]*([{letters}])(?:[)*\].:,]|\s*$)", text)
    declared = regex.search(rf"(?i:answer)\W+(?:(?i:is)\W+)?([{letters}])\b", text)
    found = alone or declared
    if found is not None:
        return found[1]
    same = [letter for letter, choice in zip(letters, choices, strict=True) if choice.strip() == text]
    return same[0] if len(same) == 1 else None


def score_json_schema(scorer: JsonSchemaScorer, answer: Answer) -> Score:
    try:
        value = json.loads(answer.text)
    except (ValueError, RecursionError) as error:
        return invalid(f"the answer is not JSON: {error}")
    try:
        # A registry of its own: the default one would fetch what a schema refers to from the network.
        validator = _Validator(scorer.schema_, registry=SPECIFICATIONS)
        problem = best_match(validator.iter_errors(value))
        is_right = not scorer.has_target or _is_same_json(value, scorer.target)
    except (Unresolvable, regex.error) as error:
        return invalid(f"the schema cannot be used: {error}"[:500])
    except TimeoutError:
        return invalid(f"a pattern of the schema took longer than {_REGEX_LIMIT_S:g} s on this answer")
    except RecursionError:
        return invalid("the answer or the schema is nested too deeply")
    if problem is not None:
        return _verdict(False, f"{problem.json_path}: {problem.message}"[:500])
    return _verdict(is_right)


def _search(pattern: str, text: str, flags: int = 0) -> bool:
    """Patterns come from outside and meet texts that nobody wrote: they get a time limit, and let others run.

    Raises:
        TimeoutError, regex.error
    """
    return regex.search(pattern, text, flags, concurrent=True, timeout=_REGEX_LIMIT_S) is not None


def _timed_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _search(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _timed_pattern})


def score_tool_call(scorer: ToolCallScorer, answer: Answer) -> Score:
    if len(answer.tool_calls) != 1:
        return invalid(f"the answer calls {len(answer.tool_calls)} tools")
    call = answer.tool_calls[0]
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        return invalid("the call's arguments are not JSON")
    if call.name != scorer.name:
        return _verdict(False, f"it calls {call.name!r}")
    return _verdict(scorer.arguments is None or _is_same_json(arguments, scorer.arguments))


def _is_same_json(left: Any, right: Any) -> bool:
    """Equal as JSON: true is not 1, and 1 is 1.0."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_same_json, left, right))
    return left == right
