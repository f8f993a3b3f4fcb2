"""Anthropic's message object, whole and as stream events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from kiln_gateway.chat.blocks import Block, BlockEvent, BlockGrew, BlockReader, BlockStarted
from kiln_gateway.chat.choice import ChoiceDelta
from kiln_gateway.chat.completion_run import CompletionRun
from kiln_gateway.chat.responses import kiln_object
from kiln_gateway.schemas.messages import MessagesBody

# For each kind of block the type of its delta and the field that grows.
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_call": ("input_json_delta", "partial_json"),
}


class MessageAnswer:
    """Builds the one message that answers a request."""

    def __init__(self, run: CompletionRun, body: MessagesBody) -> None:
        self._run = run
        self._max_tokens = body.max_tokens
        self._omits_thinking = body.thinking is not None and body.thinking.display == "omitted"
        self._reader = BlockReader()
        self._has_begun = False

    def push(self, delta: ChoiceDelta) -> Iterator[dict[str, Any]]:
        """The events of one delta, each with its `type`; those of the last one end the message.

        Raises:
            AnswerAborted: the engine gave it up.
        """
        if not self._has_begun:
            self._has_begun = True
            yield {"type": "message_start", "message": self._message()}
        for event in self._reader.push(delta):
            if shown := self._event(event):
                yield shown
        if delta.finish_reason is not None:
            usage = self._usage()
            delta_and_usage = {"delta": self._ending(), "usage": usage, "kiln": kiln_object(self._run)}
            yield {"type": "message_delta", **delta_and_usage}
            yield {"type": "message_stop"}

    def whole(self) -> dict[str, Any]:
        """The message, once the last delta was pushed."""
        content = [self._block(block, block.text) for block in self._reader.blocks]
        return {**self._message(), "content": content, **self._ending(), "kiln": kiln_object(self._run)}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._run.completion_id,
            "type": "message",
            "role": "assistant",
            "model": self._run.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
            "kiln": {"adapter": self._run.target.label},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._run.usage()
        return {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
        }

    def _ending(self) -> dict[str, Any]:
        (choice,) = self._run.choices
        assembler = choice.assembler
        reasons = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
        reason = reasons[assembler.finish_reason or "stop"]
        if assembler.stop_string is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and len(assembler.tokens) < self._max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": assembler.stop_string}

    def _event(self, event: BlockEvent) -> dict[str, Any] | None:
        block = event.block
        if isinstance(event, BlockStarted):
            shown = self._block(block, "")
            return {"type": "content_block_start", "index": block.index, "content_block": shown}
        if not isinstance(event, BlockGrew):
            return {"type": "content_block_stop", "index": block.index}
        if block.kind == "reasoning" and self._omits_thinking:
            return None
        kind, name = _DELTAS[block.kind]
        delta = {"type": kind, name: event.fragment}
        return {"type": "content_block_delta", "index": block.index, "delta": delta}

    def _block(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "text", "text": text}
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": "" if self._omits_thinking else text, "signature": ""}
        return {
            "type": "tool_use",
            "id": block.call_id,
            "name": block.name,
            "input": _arguments(text),
        }


def _arguments(text: str) -> Any:
    """A call's arguments as an object; a call that was cut off has none that could be read."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
