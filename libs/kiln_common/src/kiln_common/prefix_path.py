"""Names for the beginnings of prompts, the same in every process: which engine has computed which.

A prompt's path is one name for each of its whole pages; each depends on all tokens before it, on the
adapters and on the salt. Names are 8 bytes: two prompts share one by accident once in 2^64, and then
a request goes to an engine that has less of it cached than was thought.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NAME_BYTES = 8


def root_name(adapters: Iterable[tuple[str, float]], salt: str) -> bytes:
    """The name before the first token: (sha256, scale) of the adapters in order, and the cache salt."""
    text = "\0".join([salt, *(f"{sha256}*{scale:.9g}" for sha256, scale in adapters)])
    return blake2b(text.encode(), digest_size=NAME_BYTES).digest()


def page_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name after some more tokens."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=NAME_BYTES).digest()


def path_names(root: bytes, tokens: Sequence[int], page_tokens: int) -> list[bytes]:
    """The name at the end of each whole page of `tokens`, in order."""
    names = []
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        root = page_name(root, tokens[start : start + page_tokens])
        names.append(root)
    return names
