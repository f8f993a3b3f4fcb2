"""OpenAI's answer objects for chat, whole and in chunks, and what text completions share with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kiln_common.text.tokenizer import TextTokenizer
from kiln_common.text.tool_calls import ContentText, ToolArguments, ToolCallStarted, ToolEvent
from kiln_gateway.chat.choice import ChoiceDelta, TokenLogprob
from kiln_gateway.chat.completion_run import Choice, CompletionRun
from kiln_gateway.chat.logprobs import chat_logprobs


def version_spans(run: CompletionRun, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """`kiln.version_spans` of choices: which tokens came from which adapter version."""
    return [
        {"index": choice.index, **asdict(span)} for choice in choices for span in run.version_spans(choice)
    ]


def kiln_object(run: CompletionRun) -> dict[str, Any]:
    """What a finished answer in another API's shape says of the adapters behind it."""
    shown: dict[str, Any] = {"adapter": run.target.label}
    if run.follows_latest:
        shown["version_spans"] = version_spans(run, run.choices)
    return shown


def usage_object(run: CompletionRun) -> dict[str, Any]:
    usage = run.usage()
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
    }


def envelope(run: CompletionRun, kind: str) -> dict[str, Any]:
    """What every object about a run begins with."""
    return {
        "id": run.completion_id,
        "object": kind,
        "created": run.created_at_s,
        "model": run.model,
        "kiln": {"adapter": run.target.label},
    }


class ChatAnswer:
    """Builds the objects of one chat completion."""

    def __init__(
        self,
        run: CompletionRun,
        tokenizer: TextTokenizer,
        *,
        has_logprobs: bool,
        has_token_ids: bool,
        includes_usage: bool = False,
    ) -> None:
        self._run = run
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._has_token_ids = has_token_ids
        self._includes_usage = includes_usage

    def whole(self, events: dict[int, list[ToolEvent]]) -> dict[str, Any]:
        """The answer of a request without `stream`; `events` are those of each choice by index."""
        body = envelope(self._run, "chat.completion")
        body["choices"] = [self._whole_choice(choice, events[choice.index]) for choice in self._run.choices]
        body["usage"] = usage_object(self._run)
        if self._run.follows_latest:
            body["kiln"]["version_spans"] = version_spans(self._run, self._run.choices)
        if self._has_token_ids:
            body["prompt_token_ids"] = list(self._run.choices[0].request.prompt_token_ids)
        return body

    def _whole_choice(self, choice: Choice, events: Sequence[ToolEvent]) -> dict[str, Any]:
        assembler = choice.assembler
        calls = _whole_tool_calls(events)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not assembler.content else assembler.content,
            "refusal": None,
        }
        if assembler.reasoning:
            message["reasoning_content"] = assembler.reasoning
        if calls:
            message["tool_calls"] = calls
        body: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, assembler.tokens) if self._has_logprobs else None,
            "finish_reason": assembler.finish_reason,
        }
        if self._has_token_ids:
            body["token_ids"] = [token.token_id for token in assembler.tokens]
        return body

    def opening_chunk(self, choice: Choice) -> dict[str, Any]:
        """A choice's first chunk: the role."""
        chunk = self._chunk(choice, {"role": "assistant", "content": ""})
        if self._has_token_ids and choice.index == 0:
            chunk["prompt_token_ids"] = list(choice.request.prompt_token_ids)
        return chunk

    def chunks(self, choice: Choice, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """The chunks of one delta; tokens travel with the first of them, the reason with the last."""
        parts: list[dict[str, Any]] = []
        if delta.reasoning:
            parts.append({"reasoning_content": delta.reasoning})
        for event in delta.events:
            if isinstance(event, ContentText):
                parts.append({"content": event.text})
            elif not isinstance(event, ToolArguments | ToolCallStarted):
                continue
            else:
                parts.append({"tool_calls": [_tool_call_delta(event)]})
        shows_tokens = (self._has_logprobs or self._has_token_ids) and delta.tokens
        if not parts and (shows_tokens or delta.finish_reason is not None):
            parts.append({})
        chunks = [self._chunk(choice, part) for part in parts]
        if chunks:
            self._add_tokens(chunks[0]["choices"][0], delta.tokens)
            chunks[-1]["choices"][0]["finish_reason"] = delta.finish_reason
            if delta.finish_reason is not None and self._run.follows_latest:
                chunks[-1]["kiln"]["version_spans"] = version_spans(self._run, [choice])
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        return {
            **envelope(self._run, "chat.completion.chunk"),
            "choices": [],
            "usage": usage_object(self._run),
        }

    def _chunk(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        body = envelope(self._run, "chat.completion.chunk")
        body["choices"] = [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]
        if self._includes_usage:
            body["usage"] = None
        return body

    def _add_tokens(self, choice_body: dict[str, Any], tokens: Sequence[TokenLogprob]) -> None:
        if self._has_logprobs and tokens:
            choice_body["logprobs"] = chat_logprobs(self._tokenizer, tokens)
        if self._has_token_ids:
            choice_body["token_ids"] = [token.token_id for token in tokens]


def _tool_call_delta(event: ToolCallStarted | ToolArguments) -> dict[str, Any]:
    if isinstance(event, ToolCallStarted):
        return {
            "index": event.index,
            "id": event.call_id,
            "type": "function",
            "function": {"name": event.name, "arguments": ""},
        }
    return {"index": event.index, "function": {"arguments": event.fragment}}


def _whole_tool_calls(events: Sequence[ToolEvent]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCallStarted):
            function = {"name": event.name, "arguments": ""}
            calls.append({"id": event.call_id, "type": "function", "function": function})
        elif isinstance(event, ToolArguments):
            calls[event.index]["function"]["arguments"] += event.fragment
    return calls
