"""Finds the tokenizer and chat template of a model: in a folder, or fetched by hub id."""

from __future__ import annotations

import re
from pathlib import Path

from kiln_common.errors import ErrorKind, KilnError

# No weights: the gateway reads text files only.
_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class ModelFolderMissing(KilnError):
    code = "model_folder_missing"
    kind = ErrorKind.INTERNAL
    hint = "Set KILN_GATEWAY_MODEL_PATH to a checkpoint folder, or to a hub id while online."


def find_model_folder(path_or_hub_id: str) -> Path:
    """A local folder with the model's text files; those of a hub id are downloaded if not cached.

    Raises:
        ModelFolderMissing
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise ModelFolderMissing(f"{path_or_hub_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=_FILES))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFolderMissing(f"{path_or_hub_id} could not be fetched: {reason}") from error
