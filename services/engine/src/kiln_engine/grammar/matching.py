"""Following a grammar token by token, and the tokens it allows.

Legend: `R` rows, `W` words of 32 tokens, one bit each, the lowest token in the lowest bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from kiln_engine.domain.errors import GrammarFailed


class TokenMatcher:
    """One completion's place in a grammar; see domain.output_rules.Matcher."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    @property
    def is_at_end(self) -> bool:
        return self.matcher.is_stopped()

    def fork(self) -> TokenMatcher:
        return TokenMatcher(self.matcher.deep_copy())

    def advance(self, token_id: int) -> None:
        if not self.matcher.consume_token(token_id):
            raise GrammarFailed(
                reason_of(self.matcher.get_error()) or f"it has no place for token {token_id}"
            )


class MaskWriter:
    """Writes what matchers allow; many at once, on threads of the library's own."""

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads)

    def write(self, matchers: Sequence[tuple[int, TokenMatcher]], bits_RW: np.ndarray) -> None:
        """Fill the rows of int32 `bits_RW` that the matchers are paired with.

        A matcher that fails allows an end token, and raises when it is advanced.
        """
        assert bits_RW.dtype == np.int32
        assert bits_RW.flags.c_contiguous
        num_rows, num_words = bits_RW.shape
        pairs = [(matcher.matcher, row) for row, matcher in matchers]
        self._executor.unsafe_compute_mask_ptr(pairs, bits_RW.ctypes.data, num_words * 4, num_rows)


def reason_of(message: str) -> str:
    """The library's reason in one line, without the state of its parser."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    return " ".join(line for line in lines if line)[:500]
