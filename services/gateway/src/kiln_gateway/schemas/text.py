"""POST /v1/tokenize and /v1/detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.schemas.base import Body, TokenIds
from kiln_gateway.schemas.chat import Messages, Tool

# Of one request; more is refused rather than read for seconds.
MOST_TOKENS = 2**20


class TokenizeBody(Body):
    text: str | None = Field(None, description="at most 1,048,576 tokens")
    messages: Messages | None = None
    model: str | None = Field(None, description="accepted without effect: every model shares the tokenizer")
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> TokenizeBody:
        if (self.text is None) == (self.messages is None):
            raise PydanticCustomError(
                "conflicting_fields", "send either `text` or `messages`", {"param": "text"}
            )
        return self


class DetokenizeBody(Body):
    tokens: Annotated[TokenIds, Field(max_length=MOST_TOKENS)]
    model: str | None = Field(None, description="accepted without effect")
