"""Messages to prompt tokens, by the checkpoint's own template and tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kiln_common.errors import InvalidTokenIds, InvalidValue, PromptTooLong
from kiln_common.text.chat_template import ChatTemplate, TemplateRefused
from kiln_common.text.reasoning import opens_reasoning
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.shared_prefix import SharedPrefixes, num_common_characters
from kiln_gateway.chat.turn_tokens import TurnEncoder

_THREAD_FROM_CHARACTERS = 8_192
_THREAD_FROM_MESSAGES = 64
_RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
# The next turn of every conversation, as far as its shape matters for what stays the same.
_NEXT_TURN = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]

TemplateMessage = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine."""

    token_ids: list[int]
    # How many leading tokens the conversation's next request will begin with again.
    num_stable_prefix_tokens: int = 0
    # How many leading tokens other conversations with the same instructions and tools begin with.
    num_shared_prefix_tokens: int = 0
    # Whether the model goes on inside a thinking block that the prompt opened.
    starts_in_reasoning: bool = False


class PromptRenderer:
    """Renders and tokenises; long texts on a thread, since the tokenizer blocks."""

    def __init__(
        self, template: ChatTemplate, tokenizer: TextTokenizer, *, enable_thinking_default: bool | None
    ) -> None:
        self._template = template
        self.tokenizer = tokenizer
        self._enable_thinking_default = enable_thinking_default
        self._shared_prefixes = SharedPrefixes()
        self._turns = TurnEncoder(tokenizer)

    def variables(
        self, chat_template_kwargs: Mapping[str, Any] | None = None, *, reasoning_effort: str | None = None
    ) -> dict[str, Any]:
        """Template variables of a request; its own chat_template_kwargs win over everything.

        Raises:
            InvalidValue: a variable that the gateway itself sets.
        """
        given = dict(chat_template_kwargs or {})
        if reserved := _RESERVED_VARIABLES & given.keys():
            raise InvalidValue(
                f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
                hint="Use the request's own fields.",
            )
        variables: dict[str, Any] = {}
        if self._enable_thinking_default is not None:
            variables["enable_thinking"] = self._enable_thinking_default
        if reasoning_effort is not None:
            variables["enable_thinking"] = reasoning_effort != "none"
        return variables | given

    async def chat(
        self,
        messages: Sequence[TemplateMessage],
        *,
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        most_tokens: int,
        is_one_of_many: bool = False,
    ) -> Prompt:
        """The prompt of a chat request, where it `is_one_of_many` always on a thread.

        Raises TemplateRefused, InvalidText, and PromptTooLong where it has far more than `most_tokens`;
        closer to it the caller has to look.
        """
        num_characters = sum(len(str(message.get("content"))) for message in messages)
        render = partial(
            self.render_chat, messages, tools=tools, variables=variables, most_tokens=most_tokens
        )
        is_short = num_characters < _THREAD_FROM_CHARACTERS and len(messages) < _THREAD_FROM_MESSAGES
        return render() if is_short and not is_one_of_many else await asyncio.to_thread(render)

    async def encode(self, texts: Sequence[str], most_tokens: int, param: str) -> list[list[int]]:
        """The tokens of each text. Raises InvalidText, and PromptTooLong as `chat` does."""

        def encode_all() -> list[list[int]]:
            for text in texts:
                self._check_length(text, most_tokens, param)
            return [self.tokenizer.encode(text) for text in texts]

        is_short = sum(map(len, texts)) < _THREAD_FROM_CHARACTERS
        return encode_all() if is_short else await asyncio.to_thread(encode_all)

    def _check_length(self, text: str, most_tokens: int, param: str) -> None:
        if self.tokenizer.has_far_more_tokens(text, most_tokens):
            raise PromptTooLong(most_tokens, most_tokens, is_counted=False, param=param)

    def render_text(
        self,
        messages: Sequence[TemplateMessage],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        return self._template.render(
            merge_leading_instructions(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def render_chat(
        self,
        messages: Sequence[TemplateMessage],
        *,
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        most_tokens: int | None = None,
    ) -> Prompt:
        """`chat`, computed here and now."""
        text = self.render_text(messages, tools=tools, add_generation_prompt=True, variables=variables)
        if most_tokens is not None:
            self._check_length(text, most_tokens, "messages")
        encoded = self._turns.encode(text)
        num_stable_characters = self._num_stable_characters(text, messages, tools, variables)
        num_shared_characters = self._num_shared_characters(text, messages, tools, variables)
        # The template may render an open turn differently once it is answered, so what stays the same
        # ends where a turn begins.
        return Prompt(
            encoded.token_ids,
            num_stable_prefix_tokens=encoded.num_tokens_before_turn(num_stable_characters),
            num_shared_prefix_tokens=encoded.num_tokens_before_turn(num_shared_characters),
            starts_in_reasoning=opens_reasoning(text),
        )

    def _num_shared_characters(
        self,
        text: str,
        messages: Sequence[TemplateMessage],
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> int:
        """How much of `text` begins every conversation with the same instructions and tools."""

        def render(probe: Sequence[TemplateMessage]) -> str:
            return self.render_text(probe, tools=tools, add_generation_prompt=False, variables=variables)

        instructions = [m for m in merge_leading_instructions(messages)[:1] if m["role"] == "system"]
        return self._shared_prefixes.num_characters(text, instructions, tools, variables, render)

    def _num_stable_characters(
        self,
        text: str,
        messages: Sequence[TemplateMessage],
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> int:
        """How much of `text` begins the rendering of the conversation one turn later."""
        try:
            later = self.render_text(
                [*messages, *_NEXT_TURN], tools=tools, add_generation_prompt=False, variables=variables
            )
        except TemplateRefused:
            return 0
        return num_common_characters(text, later)


def merge_leading_instructions(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """System and developer messages at the start become one system message.

    OpenAI's API has both roles; Qwen's templates know one system message, and only as the first.
    """
    num_leading = 0
    while num_leading < len(messages) and messages[num_leading]["role"] in ("system", "developer"):
        num_leading += 1
    if num_leading == 0:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:num_leading])
    return [{"role": "system", "content": text}, *messages[num_leading:]]


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidTokenIds naming the first id outside [0, vocab_size)."""
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidTokenIds(
                f"`{param}` has the id {token_id} at position {position}, the vocabulary has {vocab_size}",
                param=param,
            )
