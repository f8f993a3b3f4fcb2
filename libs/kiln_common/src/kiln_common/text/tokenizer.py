"""A checkpoint's tokenizer: text to ids, ids to bytes, special tokens by name."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from kiln_common.errors import InvalidRequest
from kiln_common.model_folder import LASTING_FILE_ERRORS, ModelFileNotRead
from kiln_common.settings import ConfigurationError

# Marked special in some vocabularies, but part of the text that parsers and clients read.
_READABLE_SPECIAL = frozenset(
    {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
)


_SLICE_CHARACTERS = 2**17
_SLICE_MARGIN = 1024


class TokenizerUnusable(ConfigurationError):
    """The model folder has no tokenizer, or one of another kind than Qwen3.5's."""

    code = "tokenizer_unusable"
    hint = "The model folder needs the tokenizer.json of a byte-level BPE tokenizer."


class InvalidText(InvalidRequest):
    """Text that has no UTF-8 form."""

    code = "invalid_text"
    hint = "Strings must be valid Unicode: a surrogate may only appear as half of a pair."


class TextTokenizer:
    """Byte-level BPE tokenizer as Qwen3.5 checkpoints carry it. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if type(tokenizer.decoder).__name__ != "ByteLevel":
            raise TokenizerUnusable(f"the tokenizer's decoder is {tokenizer.decoder!r}, not ByteLevel")
        self._tokenizer = tokenizer
        self._added = {
            token_id: (token.content, token.special)
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._bytes_by_id: dict[int, bytes] = {}
        # In bytes: byte-level vocabularies write each as a character. A text has at least as many bytes.
        self._longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)))
        self.num_tokens: int = tokenizer.get_vocab_size(with_added_tokens=True)
        """How many ids there are; the model's vocabulary may be padded beyond it."""

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read `folder`/tokenizer.json. Raises TokenizerUnusable, ModelFileNotRead."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except FileNotFoundError as error:
            raise TokenizerUnusable(f"{path} does not exist") from error
        except LASTING_FILE_ERRORS as error:
            raise TokenizerUnusable(f"{path} cannot be read: {error}") from error
        except OSError as error:
            raise ModelFileNotRead(f"{path} could not be read: {error}") from error
        except Exception as error:  # the library has no class of its own for what it cannot read
            raise TokenizerUnusable(f"{path} cannot be read: {error}") from error
        return cls(tokenizer)

    def id_of(self, token: str) -> int | None:
        """The id of exactly this token, such as "<|im_end|>", or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        Raises:
            InvalidText: `text` holds an unpaired surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidText(f"character {error.start} of the text is an unpaired surrogate") from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def has_far_more_tokens(self, text: str, limit: int) -> bool:
        """Whether `text` has more than `limit` tokens by a wide margin, found out without all of them.

        A long text takes seconds and hundreds of bytes a character. It is read in slices until that
        is clear; a slice cuts words, which adds some tokens, hence the margin.
        """
        if len(text) <= max(limit, _SLICE_CHARACTERS):
            return False  # tokenising it takes no time to speak of
        if len(text) > limit * self._longest_token:
            return True
        num_tokens = 0
        for start in range(0, len(text), _SLICE_CHARACTERS):
            num_tokens += len(self.encode(text[start : start + _SLICE_CHARACTERS]))
            if num_tokens > 1.1 * limit + _SLICE_MARGIN:
                return True
        return False

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, special tokens written out, invalid UTF-8 replaced."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for ids the tokenizer does not have."""
        known = self._bytes_by_id.get(token_id)
        if known is None:
            known = self._bytes_by_id[token_id] = self._compute_bytes(token_id)
        return known

    def stands_alone(self, token: str) -> bool:
        """Whether this token is found wherever it is written, and nothing of the text beside it goes into it."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return any(
            one.content == token and not (one.lstrip or one.rstrip or one.single_word or one.normalized)
            for one in added
        )

    def is_hidden(self, token_id: int) -> bool:
        """Whether generated text leaves the token out: end marks, turn marks and their like."""
        content, special = self._added.get(token_id, ("", False))
        return special and content not in _READABLE_SPECIAL

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id][0].encode()
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
