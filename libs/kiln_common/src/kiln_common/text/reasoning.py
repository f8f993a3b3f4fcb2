"""Separates a model's thinking from its answer while the tokens arrive."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from kiln_common.text.marks import Mark

_TURN_MARK = "<|im_start|>"
_FUNCTION = "<function="


def opens_reasoning(prompt_text: str) -> bool:
    """Whether the prompt's last turn leaves a thinking block open for the model to fill."""
    turn = prompt_text[prompt_text.rfind(_TURN_MARK) + 1 :]
    return turn.rfind(Mark.THINK_OPEN.value) > turn.rfind(Mark.THINK_CLOSE.value)


@dataclass(frozen=True, slots=True)
class SplitText:
    """One piece's share of each kind; either may be empty."""

    reasoning: str = ""
    answer: str = ""
    # The marks in `answer` and where each begins.
    marks: tuple[tuple[int, Mark], ...] = ()


class _State(Enum):
    START = 1  # nothing but white space so far: the model may open a thinking block itself
    REASONING = 2
    MAYBE_CALL = 3  # a tool call has opened inside the block, and may yet turn out to be none
    GAP = 4  # past the block, before the answer's first visible character
    ANSWER = 5


class ReasoningSplitter:
    """Feeds on text and marks, gives reasoning and answer apart, without the blank lines round them.

    A thinking block counts only at the very beginning. It ends with its mark; or, where the model
    forgot that, with a call of one of the functions `call_names`. `separator` is what stands between
    block and answer where that is certain; otherwise it is any number of line breaks.
    """

    def __init__(
        self,
        *,
        starts_in_reasoning: bool,
        call_names: Collection[str] = (),
        separator: str | None = None,
    ) -> None:
        self._state = _State.REASONING if starts_in_reasoning else _State.START
        self._call_names = call_names
        self._separator = separator
        self._held = ""
        self._call = ""
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token still belongs to the thinking block."""
        return self._state in (_State.REASONING, _State.MAYBE_CALL)

    def push(self, text: str, mark: Mark | None = None) -> SplitText:
        """Take the text of one token, or part of it; of a mark, the mark's."""
        match self._state:
            case _State.START:
                return self._start(text, mark)
            case _State.REASONING:
                return self._reason(text, mark)
            case _State.MAYBE_CALL:
                return self._consider_call(text, mark)
            case _State.GAP:
                return self._leave_gap(text, mark)
            case _State.ANSWER:
                return _answer(text, mark)

    def finish(self) -> SplitText:
        """What was still held back, now that nothing follows."""
        held, self._held = self._held, ""
        if self._state is _State.MAYBE_CALL:
            return SplitText(reasoning=(held + self._call).rstrip())
        if self._state is _State.START:
            return SplitText(answer=held)
        return SplitText()

    def _start(self, text: str, mark: Mark | None) -> SplitText:
        if mark is Mark.THINK_OPEN:
            self._held, self._state = "", _State.REASONING
            return SplitText()
        if mark is None and not text.strip():
            self._held += text
            return SplitText()
        held, self._held, self._state = self._held, "", _State.ANSWER
        return _answer(text, mark, before=held)

    def _reason(self, text: str, mark: Mark | None) -> SplitText:
        if mark is Mark.THINK_CLOSE:
            self._held, self._state = "", _State.GAP
            return SplitText()
        if mark is Mark.CALL_OPEN and self._call_names:
            self._call, self._state = text, _State.MAYBE_CALL
            return SplitText()
        # White space may turn out to be the blank line before the closing mark.
        pending = self._held + text
        reasoning = pending.rstrip()
        self._held = pending[len(reasoning) :]
        if not self._has_reasoning:
            reasoning = reasoning.lstrip("\n")
            self._has_reasoning = bool(reasoning)
        return SplitText(reasoning)

    def _consider_call(self, text: str, mark: Mark | None) -> SplitText:
        call = self._call if mark is not None else self._call + text
        inside = call[len(Mark.CALL_OPEN.value) :].lstrip()
        if mark is None and _may_be_call(inside, self._call_names):
            self._call = call
            if ">" not in inside:
                return SplitText()
            self._held, self._state = "", _State.ANSWER
            return SplitText(answer=call, marks=((0, Mark.CALL_OPEN),))
        self._state = _State.REASONING
        before = self._reason(call, None)
        if mark is None:
            return before
        after = self._reason(text, mark)
        return SplitText(before.reasoning + after.reasoning, after.answer, after.marks)

    def _leave_gap(self, text: str, mark: Mark | None) -> SplitText:
        pending = self._held + text
        separator = self._separator
        if separator is None:
            pending = pending.lstrip("\n")
        elif separator.startswith(pending) and pending != separator and mark is None:
            self._held = pending
            return SplitText()
        else:
            pending = pending.removeprefix(separator)
        self._held = ""
        if separator is not None or pending:
            self._state = _State.ANSWER
        return _answer(text, mark) if mark is not None else SplitText(answer=pending)


def _answer(text: str, mark: Mark | None, before: str = "") -> SplitText:
    return SplitText(answer=before + text, marks=((len(before), mark),) if mark is not None else ())


def _may_be_call(inside: str, names: Collection[str]) -> bool:
    """Whether a call that has gone so far is, or may become, one of these functions'."""
    if not inside.startswith(_FUNCTION):
        return _FUNCTION.startswith(inside)
    name, end, _ = inside[len(_FUNCTION) :].partition(">")
    return name in names if end else any(known.startswith(name) for known in names)
