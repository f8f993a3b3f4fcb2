"""Token ids to text one token at a time, in time linear in the tokens."""

from __future__ import annotations

import codecs

from kiln_common.text.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """Turns a sequence's tokens into text as they arrive.

    A token may end inside a UTF-8 character: its text then comes with the token that completes the
    character. Bytes that never become one come out as U+FFFD. End and turn marks give no text.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        if self._tokenizer.is_hidden(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))

    def finish(self) -> str:
        """What an unfinished character leaves behind: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
