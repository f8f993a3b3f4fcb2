"""One choice of a completion: the engine's tokens in, text, reasoning and tool calls out.

No I/O: the same assembler serves streams, whole answers and tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kiln_common.pb import engine_pb2
from kiln_common.text.detokenizer import IncrementalDetokenizer
from kiln_common.text.marks import Mark, mark_ids
from kiln_common.text.reasoning import ReasoningSplitter, SplitText
from kiln_common.text.stop_strings import StopStringMatcher
from kiln_common.text.tokenizer import TextTokenizer
from kiln_common.text.tool_calls import ContentText, ToolCallFinished, ToolCallParser, ToolEvent
from kiln_gateway.model_resolver import adapters_label

_FINISH_REASONS = {
    engine_pb2.FINISH_REASON_STOP: "stop",
    engine_pb2.FINISH_REASON_LENGTH: "length",
    engine_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token; log-probabilities are natural, at temperature 1 unless said otherwise."""

    token_id: int
    logprob: float
    sampled_logprob: float  # under the distribution it was drawn from
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """What the prompt before it says of a prompt token, at temperature 1."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a choice's text is taken apart.

    `min_tokens` is how many tokens come before one that may complete a stop string.
    `parameter_schemas` is None where no tool calls are looked for; see ToolCallParser. With
    `has_grammar` thinking ends with its mark and nothing else, and `separator` follows; see
    ReasoningSplitter.
    """

    splits_reasoning: bool = False
    starts_in_reasoning: bool = False
    stop_strings: Sequence[str] = ()
    min_tokens: int = 0
    parameter_schemas: Mapping[str, Mapping[str, Any]] | None = None
    allows_parallel_tool_calls: bool = True
    has_grammar: bool = False
    separator: str | None = None


@dataclass(slots=True)
class ChoiceDelta:
    """What one engine step added to a choice."""

    reasoning: str = ""
    events: list[ToolEvent] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ContentText))


class ChoiceAssembler:
    """Consumes a sequence's outputs in order until `is_finished`.

    With a stop string, tokens end with the one that completed it; what the engine computed after it
    is dropped.
    """

    def __init__(self, tokenizer: TextTokenizer, rules: TextRules) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._marks = mark_ids(tokenizer) if rules.splits_reasoning else {}
        self._splitter = _splitter(rules) if rules.splits_reasoning else None
        self._num_answer_characters = 0
        self._stops = StopStringMatcher(rules.stop_strings)
        self._min_tokens = rules.min_tokens
        self._tools = ToolCallParser(rules.parameter_schemas) if rules.parameter_schemas is not None else None
        self._allows_parallel_tool_calls = rules.allows_parallel_tool_calls
        self.tokens: list[TokenLogprob] = []
        # (first token, "name@version") where other adapters took over.
        self.moves: list[tuple[int, str]] = []
        # Of the prompt's tokens from the second on, where they were asked for.
        self.prompt_logprobs: list[PromptLogprob] = []
        self._reasoning_parts: list[str] = []
        self._content_parts: list[str] = []
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.seed = 0
        self.finish_reason: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def reasoning(self) -> str:
        """The thinking so far."""
        return "".join(self._reasoning_parts)

    @property
    def content(self) -> str:
        """The answer so far, tool calls left out."""
        return "".join(self._content_parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice, if one did."""
        return self._stops.matched

    @property
    def num_tool_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    def push(self, output: engine_pb2.SequenceOutput) -> ChoiceDelta:
        """Take one step's tokens; the delta of the last step has a finish reason."""
        delta = ChoiceDelta()
        if not self.tokens:
            self.num_cached_tokens, self.seed = output.num_cached_tokens, output.seed
        if output.moved_to:
            self.moves.append((len(self.tokens), adapters_label(output.moved_to)))
        for position, logprob in enumerate(output.prompt_logprobs):
            self.prompt_logprobs.append(PromptLogprob(logprob, _top(output.top_prompt_logprobs, position)))
        for position, token_id in enumerate(output.token_ids):
            self._take(_token(output, position, token_id), delta)
            if self.is_finished:
                break
        if not self.is_finished and output.finish_reason in _FINISH_REASONS:
            reason = _FINISH_REASONS[output.finish_reason]
            self._flush(delta, is_complete=reason == "stop")
            self._finish(reason)
        self._reasoning_parts.append(delta.reasoning)
        self._content_parts.append(delta.content)
        delta.finish_reason = self.finish_reason
        return delta

    def _take(self, token: TokenLogprob, delta: ChoiceDelta) -> None:
        self.tokens.append(token)
        delta.tokens.append(token)
        if self._splitter is not None and self._splitter.is_reasoning:
            self.num_reasoning_tokens += 1
        text, mark = self._detokenizer.push(token.token_id), self._marks.get(token.token_id)
        if mark is not None:
            # An unfinished character may come out in front of it.
            self._take_text(text.removesuffix(mark.value), None, delta)
            text = mark.value
        self._take_text(text, mark, delta)

    def _take_text(self, text: str, mark: Mark | None, delta: ChoiceDelta) -> None:
        if text and not self.is_finished:
            split = SplitText(answer=text) if self._splitter is None else self._splitter.push(text, mark)
            self._take_split(split, delta)

    def _take_split(self, split: SplitText, delta: ChoiceDelta) -> None:
        delta.reasoning += split.reasoning
        if self._tools is not None:
            for place, mark in split.marks:
                self._tools.expect_mark(self._num_answer_characters + place, mark)
        self._num_answer_characters += len(split.answer)
        is_early = len(self.tokens) <= self._min_tokens
        self._take_answer(self._stops.push(split.answer, is_early=is_early), delta)
        if self._stops.matched is not None and not self.is_finished:
            self._flush_tools(delta, is_complete=True)
            self._finish("stop")

    def _take_answer(self, text: str, delta: ChoiceDelta) -> None:
        if not text:
            return
        if self._tools is None:
            delta.events.append(ContentText(text))
            return
        for event in self._tools.push(text):
            delta.events.append(event)
            if isinstance(event, ToolCallFinished) and not self._allows_parallel_tool_calls:
                self._finish("stop")
                return

    def _flush(self, delta: ChoiceDelta, *, is_complete: bool) -> None:
        """Everything held back comes out, now that no token follows."""
        self._take_text(self._detokenizer.finish(), None, delta)
        if self._splitter is not None and not self.is_finished:
            self._take_split(self._splitter.finish(), delta)
        if not self.is_finished:
            self._take_answer(self._stops.finish(), delta)
            self._flush_tools(delta, is_complete=is_complete)

    def _flush_tools(self, delta: ChoiceDelta, *, is_complete: bool) -> None:
        if self._tools is not None:
            delta.events += self._tools.finish(is_complete=is_complete)

    def _finish(self, reason: str) -> None:
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if reason == "stop" and self.num_tool_calls else reason


def _splitter(rules: TextRules) -> ReasoningSplitter:
    calls = () if rules.has_grammar else rules.parameter_schemas or ()
    return ReasoningSplitter(
        starts_in_reasoning=rules.starts_in_reasoning, call_names=calls, separator=rules.separator
    )


def _token(output: engine_pb2.SequenceOutput, position: int, token_id: int) -> TokenLogprob:
    top = _top(output.top_logprobs, position)
    return TokenLogprob(token_id, output.logprobs[position], output.sampled_logprobs[position], top)


def _top(entries: Sequence[engine_pb2.TopLogprobs], position: int) -> tuple[tuple[int, float], ...]:
    if position >= len(entries):
        return ()
    return tuple(zip(entries[position].token_ids, entries[position].logprobs, strict=True))
