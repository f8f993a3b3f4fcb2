"""What the token ids of a checkpoint stand for, as one hash that two models can be compared by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def vocabulary_hash(model_folder: Path) -> str:
    """Hex sha256 over every token id and its text, added tokens included; "" without a tokenizer.json.

    How text is cut into tokens is not part of it: whoever exchanges ids need not agree on that.

    Raises:
        ValueError: tokenizer.json is not a tokenizer's.
    """
    path = model_folder / "tokenizer.json"
    if not path.is_file():
        return ""
    try:
        raw = json.loads(path.read_bytes())
        # A unigram model lists [text, score] in the order of ids; the others map texts to ids.
        vocab = raw["model"]["vocab"]
        texts = (
            {token_id: entry[0] for token_id, entry in enumerate(vocab)}
            if isinstance(vocab, list)
            else {token_id: text for text, token_id in vocab.items()}
        )
        texts |= {token["id"]: token["content"] for token in raw.get("added_tokens") or ()}
        digest = hashlib.sha256()
        for token_id in sorted(texts):
            digest.update(f"{token_id} {json.dumps(texts[token_id])}\n".encode())
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a tokenizer's: {error!r}") from error
    return digest.hexdigest()
