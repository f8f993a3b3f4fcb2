"""Finds a model's folder: a local one as given, or a hub id fetched into the hub's cache."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path

from kiln_common.errors import ErrorKind, KilnError
from kiln_common.settings import ConfigurationError

# Tokenizer and chat template: all that the gateway reads.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*config.json")
# Pickled weights are not even downloaded.
ALL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
# Of the ways in which a file cannot be read, those that the next try would meet again. The rest (EIO, ESTALE,
# ETIMEDOUT, ENFILE ...) are the file system's own troubles, which pass.
LASTING_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class ModelFolderMissing(ConfigurationError):
    """The model is neither a folder that is there nor a hub id."""

    code = "model_folder_missing"
    kind = ErrorKind.INVALID_REQUEST
    hint = (
        "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3.5-4B while online."
    )


class ModelFileNotRead(KilnError):
    """The file system failed while the model's folder was read."""

    code = "model_file_not_read"
    kind = ErrorKind.UNAVAILABLE
    hint = "Look at the disk or the network file system that holds the model's folder; what was read is not at fault."


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
        ModelFileNotRead: the file system failed.
        HubFailed: the hub could not provide it.
    """
    folder = Path(path_or_hub_id).expanduser()
    if _is_folder(folder):
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


def _is_folder(path: Path) -> bool:
    """`is_dir`, which tells a failing file system from a folder that is not there only before Python 3.14."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except LASTING_FILE_ERRORS:
        return False
    except OSError as error:
        raise ModelFileNotRead(f"{path} could not be looked at: {error}") from error
