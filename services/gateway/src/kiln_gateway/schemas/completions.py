"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kiln_gateway.errors import FieldNotBuiltYet, UnsupportedField
from kiln_gateway.schemas.sampling import MAX_TOP_LOGPROBS, CompletionFields


def _to_prompt_list(value: Any) -> list[str | list[int]]:
    """Any of the four forms (string, strings, ids, lists of ids) as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0])):
        prompts = [value]
    else:
        prompts = value
    if not isinstance(prompts, list):
        raise PydanticCustomError("prompt_type", "Should be a string, token ids, or a list of either")
    if not prompts or any(isinstance(prompt, str | list) and not prompt for prompt in prompts):
        raise PydanticCustomError("empty_prompt", "`prompt` is empty")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(_is_int, prompt))):
            raise PydanticCustomError("prompt_type", "Should be a string, token ids, or a list of either")
    return prompts


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class TextCompletionBody(CompletionFields):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_to_prompt_list)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def num_top_logprobs(self) -> int:
        return self.logprobs or 0

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise UnsupportedField("suffix", "The model was not trained to fill in the middle.")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedField("best_of", "Ask for n completions and choose among them.")
        if self.prompt_logprobs is not None:
            raise FieldNotBuiltYet("prompt_logprobs")
        if self.echo and self.logprobs is not None:
            raise FieldNotBuiltYet("echo", "echo together with logprobs needs prompt_logprobs.")
