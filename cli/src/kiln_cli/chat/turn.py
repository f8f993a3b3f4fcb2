"""One request for a chat answer or a completion, streamed piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import kiln


@dataclass
class Answer:
    """What came back; grows while the answer streams."""

    adapter: str  # "name@version", or "base"
    completion_id: str = ""
    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None

    def take(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """Add a chunk; returns its new content and reasoning."""
        self.completion_id = chunk.get("id", self.completion_id)
        self.usage = chunk.get("usage") or self.usage
        content = reasoning = ""
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", choice)  # a completion's choice has its text itself
            content += delta.get("content") or delta.get("text") or ""
            reasoning += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls") or ():
                self._take_tool_call(part)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.content += content
        self.reasoning += reasoning
        return content, reasoning

    def _take_tool_call(self, part: dict[str, Any]) -> None:
        while len(self.tool_calls) <= part["index"]:
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self.tool_calls[part["index"]]
        call["id"] = part.get("id") or call["id"]
        function = part.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def message(self) -> dict[str, Any]:
        """The assistant's message for the next request."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def as_json(self) -> dict[str, Any]:
        return {
            "completion_id": self.completion_id,
            "adapter": self.adapter,
            "content": self.content,
            "reasoning": self.reasoning or None,
            "tool_calls": self.tool_calls or None,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
        }


def stream_answer(
    client: kiln.Client, path: str, body: dict[str, Any], on_piece: Callable[[str, str], None]
) -> Answer:
    """POST `body` to `path` and call `on_piece(content, reasoning)` for every piece that comes.

    Raises:
        kiln.KilnError: the server refused, or the stream broke off or ended in an error.
    """
    reader = kiln.SseReader()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", path, json=body) as response:
        answer = Answer(adapter=response.headers.get("X-Kiln-Adapter", "base"))
        for line in response.iter_lines():
            chunk = reader.feed(line)
            if chunk is not None:
                on_piece(*answer.take(chunk))
    return answer
