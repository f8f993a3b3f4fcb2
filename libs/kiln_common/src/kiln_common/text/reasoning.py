"""Separates a model's thinking from its answer while the text arrives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kiln_common.text.stop_strings import longest_held_suffix

OPEN_MARK = "<think>"
CLOSE_MARK = "</think>"
_TURN_MARK = "<|im_start|>"


def opens_reasoning(prompt_text: str) -> bool:
    """Whether the prompt's last turn leaves a thinking block open for the model to fill."""
    turn = prompt_text[prompt_text.rfind(_TURN_MARK) + 1 :]
    return turn.rfind(OPEN_MARK) > turn.rfind(CLOSE_MARK)


@dataclass(frozen=True, slots=True)
class SplitText:
    """One piece's share of each kind; either may be empty."""

    reasoning: str = ""
    answer: str = ""


class _State(Enum):
    START = 1  # nothing but white space so far: the model may open a thinking block itself
    REASONING = 2
    GAP = 3  # past the block, before the answer's first visible character
    ANSWER = 4


class ReasoningSplitter:
    """Feeds on text, gives reasoning and answer apart, without the marks and the blank lines round them.

    A thinking block counts only at the very beginning; a mark inside the answer is text.
    """

    def __init__(self, *, starts_in_reasoning: bool) -> None:
        self._state = _State.REASONING if starts_in_reasoning else _State.START
        self._held = ""
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token still belongs to the thinking block."""
        return self._state is _State.REASONING

    def push(self, text: str) -> SplitText:
        pending, self._held = self._held + text, ""
        reasoning = ""
        if self._state is _State.START:
            pending = self._leave_start(pending)
        if self._state is _State.REASONING:
            reasoning, pending = self._read_reasoning(pending)
        if self._state is _State.GAP:
            pending = pending.lstrip("\n")
            if pending:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER:
            return SplitText(reasoning, pending)
        return SplitText(reasoning)

    def finish(self) -> SplitText:
        """What was still held back, now that nothing follows."""
        held, self._held = self._held, ""
        if self._state is _State.REASONING:
            return SplitText(reasoning=held.rstrip())
        return SplitText(answer=held)

    def _leave_start(self, pending: str) -> str:
        visible = pending.lstrip()
        if visible.startswith(OPEN_MARK):
            self._state = _State.REASONING
            return visible[len(OPEN_MARK) :]
        if OPEN_MARK.startswith(visible):
            self._held = pending
            return ""
        self._state = _State.ANSWER
        return pending

    def _read_reasoning(self, pending: str) -> tuple[str, str]:
        """(reasoning that is certain, rest after the block if it ended)."""
        before, mark, after = pending.partition(CLOSE_MARK)
        if mark:
            self._state = _State.GAP
            reasoning = before.rstrip()
        else:
            num_held = longest_held_suffix(pending, (CLOSE_MARK,))
            certain = pending[: len(pending) - num_held]
            # White space may turn out to be the blank line before the closing mark.
            reasoning = certain.rstrip()
            self._held = pending[len(reasoning) :]
            after = ""
        if not self._has_reasoning:
            reasoning = reasoning.lstrip("\n")
            self._has_reasoning = bool(reasoning)
        return reasoning, after
