"""Log-probabilities in OpenAI's two shapes. Every generated token has an entry, end marks included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.choice import TokenLogprob


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
    """The `logprobs` of a text completion; offsets count characters of the tokens' own texts."""
    texts = [tokenizer.bytes_of(token.token_id).decode("utf-8", errors="replace") for token in tokens]
    offsets, offset = [], first_offset
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {tokenizer.bytes_of(i).decode("utf-8", errors="replace"): logprob for i, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
