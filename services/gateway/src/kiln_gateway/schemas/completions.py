"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kiln_common.errors import InvalidValue
from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.sampling import MAX_TOP_LOGPROBS, CompletionFields


def prompt_list(name: str) -> BeforeValidator:
    """Makes any of the four forms (string, strings, ids, lists of ids) a list; `name` is the field's."""

    def to_list(value: Any) -> list[str | list[int]]:
        is_one = isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0]))
        prompts = [value] if is_one else value
        if not isinstance(prompts, list):
            raise PydanticCustomError("prompt_type", "Should be a string, token ids, or a list of either")
        if not prompts or any(isinstance(prompt, str | list) and not prompt for prompt in prompts):
            raise PydanticCustomError("empty_prompt", "`{name}` is empty", {"name": name})
        for prompt in prompts:
            if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(_is_int, prompt))):
                raise PydanticCustomError("prompt_type", "Should be a string, token ids, or a list of either")
        return prompts

    return BeforeValidator(to_list)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class TextCompletionBody(CompletionFields):
    prompt: Annotated[list[str | list[int]], prompt_list("prompt")]
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="0 with echo or prompt_logprobs, where only the prompt is asked about"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="log-probabilities of the prompt's tokens, with so many alternatives"
    )

    @property
    def num_top_logprobs(self) -> int:
        return self.logprobs or 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives wanted with the log-probability of each prompt token; None where none are wanted."""
        wanted = [
            self.prompt_logprobs,
            self.logprobs if self.echo else None,
            0 if self.max_tokens == 0 else None,
        ]
        return max((number for number in wanted if number is not None), default=None)

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise UnsupportedField("suffix", "The model was not trained to fill in the middle.")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedField("best_of", "Ask for n completions and choose among them.")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidValue(
                "`max_tokens` is 0, and nothing is asked about the prompt",
                param="max_tokens",
                hint="Ask for at least one token, or send echo or prompt_logprobs.",
            )
