"""Drafts from the text itself: what followed where the sequence's last tokens stood before.

Paper: Saxena 2023, Prompt Lookup Decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORTEST_MATCH = 2
_LONGEST_MATCH = 4
# Earlier places that are looked at for a longer match, the latest first.
_MOST_PLACES = 16
# Bounds what one call costs the loop when it meets a long prompt (about a millisecond).
_MOST_TOKENS_PER_CALL = 4096


class NgramProposer:
    """Proposes what followed the longest suffix of 2 to 4 tokens that occurred before.

    Belongs to one sequence, whose tokens it is shown at every call; they only ever grow at the end. Of
    equally long matches the latest counts. A new token costs one entry: the last place of each pair of
    tokens is known, and from each place the one before it with the same pair.
    """

    def __init__(self) -> None:
        # For each pair of tokens, where its latest occurrence ends (exclusive).
        self._last_end: dict[tuple[int, int], int] = {}
        # For each end, the end of the pair's occurrence before; 0 where there was none.
        self._end_before: list[int] = [0, 0]

    def propose(self, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Up to `max_tokens` tokens that may follow; none where nothing matches.

        A prompt of which not all has been looked at yet proposes nothing.
        """
        if not self._catch_up(tokens) or max_tokens <= 0:
            return ()
        start = self._find(tokens)
        if start is None:
            return ()
        drafts: list[int] = []
        # What followed may be the suffix itself: then the text is taken to go round once more.
        for place in range(start, start + max_tokens):
            drafts.append(tokens[place] if place < len(tokens) else drafts[place - len(tokens)])
        return tuple(drafts)

    def _catch_up(self, tokens: Sequence[int]) -> bool:
        """Take in the pairs that something follows; whether these are all of them."""
        first = len(self._end_before)
        for end in range(first, min(len(tokens), first + _MOST_TOKENS_PER_CALL)):
            pair = (tokens[end - 2], tokens[end - 1])
            self._end_before.append(self._last_end.get(pair, 0))
            self._last_end[pair] = end
        return len(self._end_before) >= len(tokens)

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Where the longest match ends; the tokens from there on are what followed it."""
        if len(tokens) < _SHORTEST_MATCH:
            return None
        best, best_length = None, 0
        end = self._last_end.get((tokens[-2], tokens[-1]), 0)
        for _ in range(_MOST_PLACES):
            if not end:
                break
            length = _match_length(tokens, end)
            if length > best_length:
                best, best_length = end, length
            if length == _LONGEST_MATCH:
                break
            end = self._end_before[end]
        return best


def _match_length(tokens: Sequence[int], end: int) -> int:
    """How many tokens before `end` are those before the sequence's end; two are known to be."""
    length = _SHORTEST_MATCH
    while length < min(_LONGEST_MATCH, end) and tokens[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
