"""What a checkpoint folder says about itself besides its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

_HUB_CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")
_TURN_END = "<|im_end|>"


def model_name(model_path: str, folder: Path) -> str:
    """The id of a model nobody named: its hub id if it has one, else its folder's name."""
    if not Path(model_path).expanduser().is_dir():
        return model_path
    for part in folder.resolve().parts:
        cached = _HUB_CACHE_FOLDER.fullmatch(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    return folder.resolve().name


def stop_token_ids(folder: Path, config_eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Every id that ends a completion: the configuration's, and the tokenizer's end of turn."""
    ids = dict.fromkeys(config_eos_ids)
    tokenizer_path = folder / "tokenizer.json"
    if tokenizer_path.is_file():
        added = json.loads(tokenizer_path.read_text(encoding="utf-8")).get("added_tokens", [])
        ids.update((token["id"], None) for token in added if token.get("content") == _TURN_END)
    return tuple(ids)
