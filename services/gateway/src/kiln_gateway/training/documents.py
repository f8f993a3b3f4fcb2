"""Conversations to token documents for training, rendered as serving renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kiln_common.errors import InvalidRequest
from kiln_gateway.chat.prompt import PromptRenderer, TemplateMessage, num_common_characters

_TURN_END = "<|im_end|>"


class NoAssistantMessage(InvalidRequest):
    """The example has no assistant's message, which is what would be learned."""

    code = "no_assistant_message"
    hint = "End the messages with the assistant's answer to learn, or send train_on: all."


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and the weight of each one's cross-entropy given those before it."""

    token_ids: list[int]
    loss_weights: list[float]


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt as the engine would get it, and the tokens of the answer to it, end mark included."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]


class DocumentBuilder:
    """Computes here and now; call it on a thread for more than a few messages."""

    def __init__(self, prompts: PromptRenderer) -> None:
        self._prompts = prompts

    def answer_turn(
        self,
        messages: Sequence[TemplateMessage],
        answer: TemplateMessage,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Turn:
        """The last turn of a conversation as serving would have produced it.

        An answer without reasoning follows an empty thinking block, one with reasoning an open one.
        """
        variables = {"enable_thinking": bool(answer.get("reasoning_content"))}
        prompt = self._prompts.render_text(
            messages, tools=tools, add_generation_prompt=True, variables=variables
        )
        whole = self._prompts.render_text(
            [*messages, answer], tools=tools, add_generation_prompt=False, variables=variables
        )
        # Where a template writes the finished turn unlike its own generation prompt, the prompt is
        # what both share.
        num_shared = num_common_characters(prompt, whole)
        # The line break after the end mark is the template's, not the model's.
        end = whole.rfind(_TURN_END)
        completion = whole[num_shared : end + len(_TURN_END)] if end >= num_shared else whole[num_shared:]
        encode = self._prompts.tokenizer.encode
        return Turn(encode(prompt[:num_shared]), encode(completion))

    def completion_turn(
        self, messages: Sequence[TemplateMessage], text: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> Turn:
        """`text` exactly as it stands, after an empty thinking block, and the turn's end."""
        prompt = self._prompts.render_chat(messages, tools=tools, variables={"enable_thinking": False})
        token_ids = self._prompts.tokenizer.encode(text)
        end_id = self._prompts.tokenizer.id_of(_TURN_END)
        return Turn(prompt.token_ids, [*token_ids, end_id] if end_id is not None else token_ids)

    def assistant_documents(
        self,
        messages: Sequence[TemplateMessage],
        tools: Sequence[dict[str, Any]] | None,
        weight: float,
    ) -> list[Document]:
        """Documents in which every assistant token is learned exactly once.

        Each assistant turn follows the prompt that serving would have given it. Turns share a
        document where one's prompt continues the other; they do not where the template rewrites the
        past, as Qwen3.5's does with thinking blocks.

        Raises:
            NoAssistantMessage: there is nothing to learn.
        """
        documents: list[Document] = []
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self.answer_turn(messages[:position], message, tools)
            prompt_ids, answer_ids = turn.prompt_token_ids, turn.completion_token_ids
            prompt_weights = [0.0] * len(prompt_ids)
            if documents and prompt_ids[: len(documents[-1].token_ids)] == documents[-1].token_ids:
                earlier = documents.pop()
                prompt_weights[: len(earlier.loss_weights)] = earlier.loss_weights
            documents.append(Document(prompt_ids + answer_ids, prompt_weights + [weight] * len(answer_ids)))
        if not documents:
            raise NoAssistantMessage("the messages have no assistant message", param="examples")
        return documents

    def whole_document(
        self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] | None, weight: float
    ) -> Document:
        """The conversation as one document in which every token is learned."""
        text = self._prompts.render_text(messages, tools=tools, add_generation_prompt=False, variables={})
        return weigh_all(self._prompts.tokenizer.encode(text), weight)


def weigh_all(token_ids: list[int], weight: float) -> Document:
    """Every token but the first, which nothing predicts."""
    return Document(token_ids, [0.0] + [weight] * (len(token_ids) - 1))


def weigh_answer(turn: Turn, weight: float, *, includes_prompt: bool) -> Document:
    token_ids = turn.prompt_token_ids + turn.completion_token_ids
    if includes_prompt:
        return weigh_all(token_ids, weight)
    weights = [0.0] * len(turn.prompt_token_ids) + [weight] * len(turn.completion_token_ids)
    return Document(token_ids, weights)
