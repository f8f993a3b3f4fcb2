"""Rendered conversations to tokens, turn by turn: what was tokenised lately is not tokenised again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.shared_prefix import TURN_MARK

_MOST_CHARACTERS = 8 * 2**20
# A longer turn would push out too many others.
_LONGEST_TURN = _MOST_CHARACTERS // 8


@dataclass(frozen=True, slots=True)
class EncodedTurns:
    """The tokens of a rendered conversation, and where each turn begins: (character, token), ascending."""

    token_ids: list[int]
    turns: list[tuple[int, int]]

    def num_tokens_before_turn(self, num_characters: int) -> int:
        """How many tokens precede the last turn that begins within the first characters."""
        within = [token for character, token in self.turns if character <= num_characters]
        return within[-1] if within else 0


class TurnEncoder:
    """Tokenises the pieces of a text between turn marks, and remembers the pieces.

    The mark is a token of its own wherever it stands, so the pieces' tokens are those of the whole
    text. A conversation's next request repeats all its turns but the last two, and its system message
    and tools are those of many others. Safe to use from several threads.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_marks = tokenizer.stands_alone(TURN_MARK)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._num_characters = 0

    def encode(self, text: str) -> EncodedTurns:
        """Raises InvalidText."""
        if not self._has_marks:
            return EncodedTurns(self._tokenizer.encode(text), [])
        head, *rest = text.split(TURN_MARK)
        pieces = [head, *(TURN_MARK + piece for piece in rest)]
        encoded = [self._encode(piece) if piece else [] for piece in pieces]
        characters = accumulate(map(len, pieces))
        tokens = accumulate(map(len, encoded))
        ends = list(zip(characters, tokens, strict=True))
        return EncodedTurns([token for piece in encoded for token in piece], ends[:-1])

    def _encode(self, piece: str) -> list[int]:
        with self._lock:
            token_ids = self._known.get(piece)
            if token_ids is not None:
                self._known.move_to_end(piece)
                return token_ids
        token_ids = self._tokenizer.encode(piece)
        if len(piece) <= _LONGEST_TURN:
            self._remember(piece, token_ids)
        return token_ids

    def _remember(self, piece: str, token_ids: list[int]) -> None:
        with self._lock:
            if piece not in self._known:
                self._num_characters += len(piece)
            self._known[piece] = token_ids
            while self._num_characters > _MOST_CHARACTERS:
                oldest, _ = self._known.popitem(last=False)
                self._num_characters -= len(oldest)
