"""OpenAI's response object, whole and as stream events."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import orjson

from kiln_common.ids import new_id
from kiln_gateway.chat.blocks import Block, BlockEnded, BlockEvent, BlockGrew, BlockReader, BlockStarted
from kiln_gateway.chat.choice import ChoiceDelta
from kiln_gateway.chat.completion_run import CompletionRun
from kiln_gateway.chat.responses import kiln_object
from kiln_gateway.schemas.responses import ResponsesBody

_ID_PREFIXES = {"reasoning": "rs", "text": "msg", "tool_call": "fc"}
# The event that carries a fragment of each kind of block.
_GROWTH = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "tool_call": "response.function_call_arguments",
}


class ResponseAnswer:
    """Builds the response of one request."""

    def __init__(self, run: CompletionRun, body: ResponsesBody) -> None:
        self._run = run
        self._body = body
        self._reader = BlockReader()
        self._item_ids: dict[int, str] = {}
        self._finish_reason: str | None = None
        self._completed_at_s: int | None = None
        self._numbers = itertools.count()
        self._has_begun = False

    def push(self, delta: ChoiceDelta) -> Iterator[dict[str, Any]]:
        """The events of one delta, each with its `type`; `ending` follows those of the last one.

        Raises:
            AnswerAborted: the engine gave it up.
        """
        if not self._has_begun:
            self._has_begun = True
            yield self._event("response.created", response=self.whole())
            yield self._event("response.in_progress", response=self.whole())
        self._finish_reason = delta.finish_reason
        if delta.finish_reason is not None:
            self._completed_at_s = int(time.time())
        for event in self._reader.push(delta):
            yield from self._block_events(event)

    def ending(self) -> dict[str, Any]:
        """The event that carries the whole response."""
        return self._event(f"response.{self._status()}", response=self.whole())

    def whole(self) -> dict[str, Any]:
        """The response as it stands."""
        body, status = self._body, self._status()
        reasoning = {"effort": body.reasoning.effort if body.reasoning else None, "summary": None}
        text_format = (
            body.text.format.model_dump(by_alias=True, exclude_none=True)
            if body.text and body.text.format
            else {"type": "text"}
        )
        return {
            "id": self._run.completion_id,
            "object": "response",
            "created_at": self._run.created_at_s,
            "completed_at": self._completed_at_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._run.model,
            "output": [self._item(block) for block in self._reader.blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": reasoning,
            "store": self._run.keeps_rollouts,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text_format},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if self._finish_reason is not None else None,
            "kiln": kiln_object(self._run),
        }

    def message(self) -> dict[str, Any]:
        """The answer as a chat message of the conversation. A call that was cut off is left out."""
        texts = {"reasoning": "", "text": ""}
        calls = []
        for block in self._reader.blocks:
            if block.kind != "tool_call":
                texts[block.kind] += block.text
            elif _is_object(block.text):
                function = {"name": block.name, "arguments": block.text}
                calls.append({"id": block.call_id, "function": function})
        message: dict[str, Any] = {"role": "assistant", "content": texts["text"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return message

    def _status(self) -> str:
        if self._finish_reason is None:
            return "in_progress"
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _usage(self) -> dict[str, Any]:
        usage = self._run.usage()
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _block_events(self, event: BlockEvent) -> Iterator[dict[str, Any]]:
        block = event.block
        if isinstance(event, BlockStarted):
            item = self._item(block, is_open=True)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "tool_call":
                yield self._event("response.content_part.added", **self._place(block), part=_part(block, ""))
        elif isinstance(event, BlockGrew):
            logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            kind = f"{_GROWTH[block.kind]}.delta"
            yield self._event(kind, **self._place(block), delta=event.fragment, **logprobs)
        elif isinstance(event, BlockEnded):
            yield from self._ending_of(block)

    def _ending_of(self, block: Block) -> Iterator[dict[str, Any]]:
        kind, text = f"{_GROWTH[block.kind]}.done", block.text
        if block.kind == "tool_call":
            yield self._event(kind, **self._place(block), name=block.name, arguments=text)
        else:
            logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(kind, **self._place(block), text=text, **logprobs)
            yield self._event("response.content_part.done", **self._place(block), part=_part(block, text))
        item = self._item(block)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind == "tool_call" else {**place, "content_index": 0}

    def _item_id(self, block: Block) -> str:
        return self._item_ids.setdefault(block.index, new_id(_ID_PREFIXES[block.kind]))

    def _item(self, block: Block, *, is_open: bool = False) -> dict[str, Any]:
        """A block as an output item; `is_open` is how it looks before its first fragment."""
        is_last = block is self._reader.blocks[-1]
        is_cut = is_last and self._finish_reason == "length"
        status = "in_progress" if is_open else "incomplete" if is_cut else "completed"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "tool_call":
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return {**item, "type": "function_call", **call}
        content = [] if is_open else [_part(block, block.text)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
