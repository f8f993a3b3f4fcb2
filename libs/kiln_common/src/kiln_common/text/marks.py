"""The tokens that take an answer apart. What merely spells one of them out is text like any other."""

from __future__ import annotations

from enum import Enum

from kiln_common.text.tokenizer import TextTokenizer


class Mark(Enum):
    """A token that means something to the parsers; its value is its text."""

    THINK_OPEN = "<think>"
    THINK_CLOSE = "</think>"
    CALL_OPEN = "<tool_call>"
    CALL_CLOSE = "</tool_call>"


def mark_ids(tokenizer: TextTokenizer) -> dict[int, Mark]:
    """The marks by token id, as far as the tokenizer has them."""
    ids = {tokenizer.id_of(mark.value): mark for mark in Mark}
    return {token_id: mark for token_id, mark in ids.items() if token_id is not None}
