"""Log-probabilities in OpenAI's two shapes. Every generated token has an entry, end marks included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.choice import PromptLogprob, TokenLogprob


def chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {"content": [_entry(tokenizer, token) for token in tokens], "refusal": None}


def _entry(tokenizer: TextTokenizer, token: TokenLogprob) -> dict[str, Any]:
    return {
        **_shown(tokenizer, token.token_id, token.logprob),
        "top_logprobs": [_shown(tokenizer, token_id, logprob) for token_id, logprob in token.top],
    }


def _shown(tokenizer: TextTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.bytes_of(token_id)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}


def text_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[TokenLogprob], first_offset: int
) -> dict[str, Any]:
    """The `logprobs` of a text completion; offsets count characters of the tokens' own texts.

    Each entry of `top_logprobs` holds the token itself too, so up to one more than was asked for.
    """
    return {
        **_places(tokenizer, [token.token_id for token in tokens], first_offset),
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            _by_text(tokenizer, [*token.top, (token.token_id, token.logprob)]) for token in tokens
        ],
    }


def echoed_logprobs(
    tokenizer: TextTokenizer, token_ids: Sequence[int], logprobs: Sequence[PromptLogprob], num_top: int
) -> dict[str, Any]:
    """The same of an echoed prompt: nothing is known of its first token."""
    pairs = zip(token_ids[1:], logprobs, strict=True)
    tops = [[*entry.top[:num_top], (token_id, entry.logprob)] for token_id, entry in pairs]
    return {
        **_places(tokenizer, token_ids, 0),
        "token_logprobs": [None, *(entry.logprob for entry in logprobs)],
        "top_logprobs": [None, *(_by_text(tokenizer, top) for top in tops)],
    }


def prompt_logprobs(
    tokenizer: TextTokenizer, token_ids: Sequence[int], logprobs: Sequence[PromptLogprob], num_top: int
) -> list[Any]:
    """For each prompt token but the first, which gets null, it and its alternatives by token id."""
    entries: list[Any] = [None]
    for token_id, entry in zip(token_ids[1:], logprobs, strict=True):
        known = {token_id: entry.logprob, **dict(entry.top[:num_top])}
        entries.append(
            {
                str(i): {"logprob": logprob, "decoded_token": _text(tokenizer, i)}
                for i, logprob in known.items()
            }
        )
    return entries


def _places(tokenizer: TextTokenizer, token_ids: Sequence[int], first_offset: int) -> dict[str, Any]:
    texts = [_text(tokenizer, token_id) for token_id in token_ids]
    offsets = list(accumulate(map(len, texts), initial=first_offset))
    return {"tokens": texts, "text_offset": offsets[:-1]}


def _by_text(tokenizer: TextTokenizer, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The token itself comes last: where texts are equal, the entry is its own."""
    return {_text(tokenizer, token_id): logprob for token_id, logprob in top}


def _text(tokenizer: TextTokenizer, token_id: int) -> str:
    return tokenizer.bytes_of(token_id).decode("utf-8", errors="replace")
