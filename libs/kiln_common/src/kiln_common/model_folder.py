"""Finds a model's folder: a local one as given, or a hub id fetched into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kiln_common.errors import ErrorKind, KilnError
from kiln_common.settings import ConfigurationError

# Tokenizer and chat template: all that the gateway reads.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*config.json")
# Pickled weights are not even downloaded.
ALL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class ModelFolderMissing(ConfigurationError):
    """The model is neither a folder that is there nor a hub id."""

    code = "model_folder_missing"
    kind = ErrorKind.INVALID_REQUEST
    hint = (
        "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3.5-4B while online."
    )


class HubFailed(KilnError):
    """The hub did not provide the model: this machine is offline, or there is no model of this name for you."""

    code = "hub_failed"
    kind = ErrorKind.UNAVAILABLE
    hint = (
        "Look at the model's name and at the connection; HF_ENDPOINT names the hub, HF_TOKEN the key for what"
        " is not public. Or give the folder of a checkpoint."
    )


def find_model_folder(path_or_hub_id: str | Path, files: Sequence[str] = ALL_FILES) -> Path:
    """The local folder of a model; of a hub id, the `files` that are not in its cache are downloaded.

    Raises:
        ModelFolderMissing: no such folder, and not a hub id.
        HubFailed: the hub could not provide it.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    hub_id = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(hub_id):
        raise ModelFolderMissing(f"{hub_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises HTTP, OS and value errors without a common root
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubFailed(f"{hub_id} is not a folder and could not be fetched: {reason}") from error
