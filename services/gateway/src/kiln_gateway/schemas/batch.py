"""POST /v1/completions/batch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kiln_gateway.schemas.base import Body, Reference
from kiln_gateway.schemas.chat import ChatCompletionBody, ChatFields, Messages
from kiln_gateway.schemas.sampling import ComposedAdapter

# Fields of a prompt that stand in for the request's.
_ADAPTER_FIELDS = frozenset({"adapter", "adapters"})
_SEEDS = 2**64


def _to_prompt(value: Any) -> Any:
    """A prompt as an object: a list of messages is one without an adapter of its own."""
    return {"messages": value} if isinstance(value, list) else value


class BatchPrompt(Body):
    """A conversation, and the adapter that answers it where that is not the request's."""

    messages: Messages
    adapter: Reference | None = None
    adapters: Annotated[list[ComposedAdapter], Field(min_length=1, max_length=8)] | None = None


def _refuse_empty(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty_prompt", "`prompts` is empty")
    return value


class BatchBody(ChatFields):
    """`prompts` are conversations, or objects with `messages` and an adapter of their own."""

    prompts: Annotated[
        list[Annotated[BatchPrompt, BeforeValidator(_to_prompt)]],
        Field(max_length=4096),
        BeforeValidator(_refuse_empty),
    ]

    def chat_body(self, index: int) -> ChatCompletionBody:
        """The chat request of one prompt. Of a seeded batch each answer has its own stream."""
        prompt = self.prompts[index]
        own = prompt.model_fields_set & _ADAPTER_FIELDS
        shared = self.model_fields_set - {"prompts"} - (_ADAPTER_FIELDS if own else frozenset())
        fields = {name: getattr(self, name) for name in shared}
        fields |= {name: getattr(prompt, name) for name in own}
        if self.seed is not None:
            fields["seed"] = (self.seed + index * self.num_choices) % _SEEDS
        return ChatCompletionBody(messages=prompt.messages, **fields)
