"""What the text of an answer must look like: response_format and structured_outputs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.schemas.base import Body

_MOST_CHOICES = 1000


class JsonSchemaFormat(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = Field(None, description="accepted without effect")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="left out: any object")
    strict: bool | None = Field(
        None, description="false leaves out what cannot be enforced; otherwise that is refused"
    )


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type json_schema need each other")
        return self


class StructuredOutputs(Body):
    """One of these."""

    json_: dict[str, Any] | bool | None = Field(None, alias="json", description="JSON schema")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=_MOST_CHOICES)]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="EBNF with `root ::=`, or Lark with `start:`"
    )

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [value for value in (self.json_, self.regex, self.choice, self.grammar) if value is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "conflicting_fields",
                "structured_outputs takes one of json, regex, choice and grammar, got {number}",
                {"number": len(given)},
            )
        return self
