"""POST /v1/train/opd."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.schemas.base import Body, Reference, TokenIds
from kiln_gateway.schemas.chat import Messages, Tool
from kiln_gateway.schemas.training import GivenRollout, JobFields, PromptText, check_is_one_group

DivergenceName = Literal["reverse_kl", "forward_kl", "jsd"]


def _to_prompt(value: Any) -> Any:
    if isinstance(value, str):
        return {"prompt": value}
    return {"messages": value} if isinstance(value, list) else value


def _to_divergence(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _to_teacher(value: Any) -> Any:
    return {"adapter": value} if isinstance(value, str) else value


class OpdPromptFields(Body):
    """A prompt to sample. A string stands for `prompt`, a list for `messages`."""

    prompt: PromptText | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> OpdPromptFields:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("conflicting_fields", "a prompt has either `prompt` or `messages`")
        return self


class OpdGroupFields(Body):
    """Completions of one prompt that are there already, as a rule the student's own."""

    prompt: PromptText | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    completions: Annotated[list[str], Field(min_length=1)] | None = None
    rollouts: Annotated[list[GivenRollout], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_one_group(self) -> OpdGroupFields:
        check_is_one_group(self.prompt, self.messages, self.completions, self.rollouts)
        return self


class DivergenceFields(Body):
    """What is lowered at every completion token. A string stands for `type`."""

    type: DivergenceName = "reverse_kl"
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="the teacher's share of the mixture, for jsd"
    )


class RolloutSettings(Body):
    """How the student is sampled, and how often anew."""

    n: Annotated[int, Field(ge=1, le=1024)] = Field(default=1, description="completions drawn of each prompt")
    max_tokens: Annotated[int, Field(ge=1, lt=2**20)] = 256
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = Field(default=0, description="0 or -1 keeps every token")
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop_token_ids: TokenIds | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompts_per_step: Annotated[int, Field(ge=1, le=16_384)] = Field(
        default=8, description="prompts of one optimiser step"
    )
    refresh_every: Annotated[int, Field(ge=1, lt=2**31)] = Field(
        default=1, description="optimiser steps for which one version of the student is sampled"
    )


class TeacherFields(Body):
    """Who teaches: an adapter, or another engine's model. A string stands for `adapter`."""

    adapter: Reference | None = Field(None, description='"base", or an adapter')
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="id under which another engine serves a model of the same tokenizer"
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="that model's weights; left out: those it has now"
    )
    top_k: Annotated[int, Field(ge=1, le=256)] = Field(
        default=64, description="how many of that model's likeliest tokens are told apart"
    )

    @model_validator(mode="after")
    def _is_one(self) -> TeacherFields:
        if (self.adapter is None) == (self.model is None):
            raise PydanticCustomError("invalid_value", "a teacher has either `adapter` or `model`")
        return self


OpdPrompt = Annotated[
    OpdPromptFields,
    BeforeValidator(_to_prompt, json_schema_input_type=PromptText | Messages | OpdPromptFields),
]
Divergence = Annotated[
    DivergenceFields,
    BeforeValidator(_to_divergence, json_schema_input_type=DivergenceName | DivergenceFields),
]


Teacher = Annotated[
    TeacherFields,
    BeforeValidator(_to_teacher, json_schema_input_type=Reference | TeacherFields),
]


class OpdBody(JobFields):
    teacher: Teacher = Field(description='"base", an adapter, or another engine\'s model')
    prompts: Annotated[list[OpdPrompt], Field(min_length=1, max_length=4096)] | None = Field(
        None, description="the job samples them as it goes; at most 4,096"
    )
    groups: Annotated[list[OpdGroupFields], Field(min_length=1)] | None = Field(
        None, description="completions that are there already"
    )
    divergence: Divergence = Field(default_factory=DivergenceFields)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)

    @model_validator(mode="after")
    def _has_data(self) -> OpdBody:
        if self.prompts is None and self.groups is None:
            raise PydanticCustomError("missing_field", "`prompts` is missing", {"param": "prompts"})
        for other in ("prompts", "rollout"):
            if self.groups is not None and other in self.model_fields_set:
                raise PydanticCustomError(
                    "conflicting_fields",
                    "send `groups` or `{name}`, not both: groups are not sampled",
                    {"name": other, "param": other},
                )
        return self
