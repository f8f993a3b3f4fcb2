"""Suites, their cases and scorers, and the bodies of /v1/evals."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.schemas.base import Body, Reference
from kiln_gateway.schemas.chat import Messages, Tool
from kiln_gateway.schemas.gate import EvalSettings
from kiln_gateway.schemas.training import PromptText

MAX_CASES = 10_000

Text = Annotated[str, Field(max_length=65_536)]
Texts = Annotated[
    list[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1, max_length=100),
]


class ExactScorer(Body):
    """The whole answer is one of the targets; white space around both is not looked at."""

    type: Literal["exact"]
    target: Texts
    ignore_case: bool = False


class ContainsScorer(Body):
    """The answer has one of the targets in it."""

    type: Literal["contains"]
    target: Texts
    ignore_case: bool = False


class RegexScorer(Body):
    """The pattern is found in the answer; looking for it takes a second at most."""

    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1, max_length=4096)]
    ignore_case: bool = False


class NumericScorer(Body):
    """The answer's last number is the target, within one of the tolerances."""

    type: Literal["numeric"]
    target: float
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    relative_tolerance: Annotated[float, Field(ge=0)] = 0.0


class MultipleChoiceScorer(Body):
    """The answer names the right choice by its letter. The choices are shown after the question."""

    type: Literal["multiple_choice"]
    choices: Annotated[list[Text], Field(min_length=2, max_length=26)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _has_its_answer(self) -> MultipleChoiceScorer:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, the last choice is {len(self.choices) - 1}")
        return self


class JsonSchemaScorer(Body):
    """The answer is JSON that follows the schema and, where one is given, equals the target."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")
    target: Any = None

    @property
    def has_target(self) -> bool:
        return "target" in self.model_fields_set


class ToolCallScorer(Body):
    """The answer calls this one tool, with these arguments where they are given."""

    type: Literal["tool_call"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: dict[str, Any] | None = None


class CodeScorer(Body):
    """The answer's code, followed by the tests, ends well in the sandbox."""

    type: Literal["code"]
    language: Literal["python", "shell"] = "python"
    tests: Text = ""
    time_limit_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    memory_limit_mb: Annotated[int, Field(ge=64, le=4096)] = 512


class JudgeScorer(Body):
    """Another model of this deployment says how well the answer meets the criteria."""

    type: Literal["judge"]
    criteria: Annotated[str, Field(min_length=1, max_length=16_384)]
    model: Reference = Field("base", description='"base", or an adapter with or without its version')
    scale: Annotated[int, Field(ge=2, le=10)] = Field(
        2, description="2: right or wrong; more: grades from 1 to this one, scored from 0 to 1"
    )


Scorer = Annotated[
    ExactScorer
    | ContainsScorer
    | RegexScorer
    | NumericScorer
    | MultipleChoiceScorer
    | JsonSchemaScorer
    | ToolCallScorer
    | CodeScorer
    | JudgeScorer,
    Field(discriminator="type"),
]


class EvalCaseFields(Body):
    """One line of a suite."""

    prompt: PromptText | None = Field(None, description="one user message")
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    scorer: Scorer
    id: Annotated[str, Field(max_length=256)] | None = Field(None, description="the author's own")

    @model_validator(mode="after")
    def _has_one_form(self) -> EvalCaseFields:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("conflicting_fields", "a case has either `prompt` or `messages`")
        if self.scorer.type == "tool_call" and not self.tools:
            raise ValueError("tools are missing: the scorer looks for a call of one")
        return self


class SuiteBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    jsonl: str | None = Field(None, description="the file as it is: one case a line")
    cases: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_CASES)] | None = Field(
        None, description="the cases as a list instead"
    )

    @model_validator(mode="after")
    def _has_one_form(self) -> SuiteBody:
        if (self.jsonl is None) == (self.cases is None):
            raise PydanticCustomError("conflicting_fields", "a suite is either `jsonl` or `cases`")
        return self


class RunBody(Body):
    suite: Annotated[str, Field(min_length=1, max_length=160)] = Field(
        description='"name" for its latest version, "name@version", or the id'
    )
    adapter: Reference | None = Field(
        None, description="version to evaluate; null: the bare base model; left out: what answers by default"
    )
    sampling: EvalSettings = EvalSettings()

    @property
    def is_adapter_given(self) -> bool:
        return "adapter" in self.model_fields_set


class CompareBody(Body):
    """Two runs that succeeded, over the same suite."""

    baseline: Annotated[str, Field(min_length=1, max_length=80)]
    candidate: Annotated[str, Field(min_length=1, max_length=80)]
