"""Fields that chat and text completions share: which weights, how to draw, what to return."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kiln_gateway.errors import UnsupportedField
from kiln_gateway.schemas.base import Body, Reference, StopStrings, TokenIds
from kiln_gateway.schemas.structured import StructuredOutputs

MAX_TOP_LOGPROBS = 20


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="accepted without effect")


class ComposedAdapter(Body):
    name: Reference
    scale: Annotated[float, Field(ge=-16, le=16)] = 1.0

    @model_validator(mode="after")
    def _does_something(self) -> ComposedAdapter:
        if self.scale == 0:
            raise PydanticCustomError(
                "invalid_scale", "the adapter {name} has the scale 0", {"name": self.name}
            )
        return self


class CompletionFields(Body):
    """Everything about a completion except its prompt."""

    model: Reference | None = Field(None, description="base model id, adapter name or name@version")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="0 or -1 keeps every token"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=4096)] | None
    ) = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="within the first so many tokens nothing in `stop` or `stop_token_ids` ends the answer, and no end token;"
        " a grammar that has come to its end stops earlier",
    )
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    store: bool | None = Field(None, description="false keeps no rollout")
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    adapter: Reference | None = None
    adapters: Annotated[list[ComposedAdapter], Field(min_length=1, max_length=8)] | None = None
    adapter_policy: Literal["pin", "latest"] | None = Field(
        None,
        description="`pin` keeps the version a request began with; `latest` goes on with newer ones between two tokens, and `kiln.version_spans` says which tokens came from which",
    )
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(None, description="accepted without effect")
    metadata: dict[str, Any] | None = Field(None, description="accepted without effect")
    service_tier: str | None = Field(None, description="accepted without effect")
    safety_identifier: str | None = Field(None, description="accepted without effect")
    prompt_cache_key: str | None = Field(None, description="accepted without effect")
    prompt_cache_retention: str | None = Field(None, description="accepted without effect")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="accepted without effect")

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of a completion that the request allows; None where it does not say."""
        return self.max_tokens

    @property
    def is_adapter_given(self) -> bool:
        """Whether the request has the field `adapter`, null included."""
        return "adapter" in self.model_fields_set

    @property
    def _references(self) -> list[str]:
        """Every name of weights in the request."""
        named = [self.model, self.adapter, *(adapter.name for adapter in self.adapters or ())]
        return [reference for reference in named if reference is not None]

    def refuse_unsupported(self) -> None:
        """Refuse, by name, what would change the answer and cannot be honoured.

        Raises:
            UnsupportedField
        """
        if self.adapter_policy == "latest" and any("@" in reference for reference in self._references):
            raise UnsupportedField("adapter_policy", 'Name the adapter without a version, or send "pin".')

    @model_validator(mode="after")
    def _has_stream_for_its_options(self) -> CompletionFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @model_validator(mode="after")
    def _allows_as_many_as_it_asks_for(self) -> CompletionFields:
        if self.min_tokens and self.most_tokens is not None and self.min_tokens > self.most_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, and max_tokens allows {self.most_tokens} at the most"
            )
        return self
