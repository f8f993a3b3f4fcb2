"""A choice's answer as a row of blocks: thinking, text and tool calls, in the order they came.

The Messages and Responses APIs show answers in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kiln_common.text.tool_calls import ContentText, ToolArguments, ToolCallFinished, ToolCallStarted
from kiln_gateway.chat.choice import ChoiceDelta
from kiln_gateway.errors import AnswerAborted

Kind = Literal["reasoning", "text", "tool_call"]


@dataclass(slots=True)
class Block:
    """One block so far; `call_id` and `name` are a tool call's."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    _parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The thinking, the text, or the JSON of a call's arguments."""
        return "".join(self._parts)


@dataclass(frozen=True, slots=True)
class BlockStarted:
    block: Block


@dataclass(frozen=True, slots=True)
class BlockGrew:
    block: Block
    fragment: str


@dataclass(frozen=True, slots=True)
class BlockEnded:
    block: Block


BlockEvent = BlockStarted | BlockGrew | BlockEnded


class BlockReader:
    """Takes a choice's deltas in order; a block ends where the next begins, the last one with the choice."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def push(self, delta: ChoiceDelta) -> list[BlockEvent]:
        """What the delta adds.

        Raises:
            AnswerAborted: it ends an answer that has no end of its own.
        """
        if delta.finish_reason == "abort":
            raise AnswerAborted
        events: list[BlockEvent] = []
        if delta.reasoning:
            self._grow("reasoning", delta.reasoning, events)
        for event in delta.events:
            if isinstance(event, ContentText):
                self._grow("text", event.text, events)
            elif isinstance(event, ToolCallStarted):
                self._start("tool_call", events, event.call_id, event.name)
            elif isinstance(event, ToolArguments):
                self._grow("tool_call", event.fragment, events)
            elif isinstance(event, ToolCallFinished):
                self._end(events)
        if delta.finish_reason is not None:
            self._end(events)
        return events

    def _grow(self, kind: Kind, fragment: str, events: list[BlockEvent]) -> None:
        block = self._open
        if block is None or block.kind != kind:
            block = self._start(kind, events)
        block._parts.append(fragment)
        events.append(BlockGrew(block, fragment))

    def _start(self, kind: Kind, events: list[BlockEvent], call_id: str = "", name: str = "") -> Block:
        self._end(events)
        self._open = block = Block(len(self.blocks), kind, call_id, name)
        self.blocks.append(block)
        events.append(BlockStarted(block))
        return block

    def _end(self, events: list[BlockEvent]) -> None:
        if self._open is not None:
            events.append(BlockEnded(self._open))
            self._open = None
