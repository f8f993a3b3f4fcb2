"""Finds the folder of a model: a local one as given, or a hub id fetched into the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from kiln_nn.errors import ModelNotFound

# Weights in safetensors, configuration and tokenizer; pickled weights are not even downloaded.
_ALLOWED_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve_model(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded if it is not in the cache.

    Raises:
        ModelNotFound: no such folder, and not a hub id or the hub could not provide it.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    hub_id = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(hub_id):
        raise ModelNotFound(f"{hub_id} is neither a folder nor a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelNotFound(
            f"{hub_id} is not a folder, and huggingface_hub is not installed to fetch it"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_ALLOWED_PATTERNS)))
    except Exception as error:  # the hub client raises HTTP, OS and value errors without a common root
        raise ModelNotFound(
            f"{hub_id} is not a folder and could not be fetched: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
