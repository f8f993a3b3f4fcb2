"""Fetches a model's files from a hub and compares every one with the hash that the hub gives for it."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kiln_cli.errors import ChecksumMismatch
from kiln_common.model_folder import ALL_FILES, HubFailed

_PIECE_BYTES = 2**20


def pull(
    model_id: str, revision: str | None, target: Path | None, on_file: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Into the hub's cache, or the folder `target`; files that are there already are only checked.

    `on_file(name, number, count)` is called before each. HF_ENDPOINT names another hub, HF_TOKEN a key.

    Raises:
        HubFailed: the hub cannot be reached, or has no such model for us.
        ChecksumMismatch: a file is not the hub's; it was removed.
    """
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = _asking(
        model_id, lambda: HfApi(endpoint).model_info(model_id, revision=revision, files_metadata=True)
    )
    wanted = [entry for entry in info.siblings or () if _is_wanted(entry.rfilename)]
    if not any(entry.rfilename == "config.json" for entry in wanted):
        raise HubFailed(f"{model_id} has no config.json", hint="Name a model of the Qwen3.5 family.")
    folder, num_bytes = Path(), 0
    for number, entry in enumerate(wanted, start=1):
        on_file(entry.rfilename, number, len(wanted))
        path = _fetch(model_id, entry.rfilename, info.sha, target, endpoint)
        _check(model_id, entry, path)
        num_bytes += path.stat().st_size
        if entry.rfilename == "config.json":
            folder = path.parent
    return {
        "model": model_id,
        "revision": info.sha,
        "folder": str(folder),
        "files": len(wanted),
        "bytes": num_bytes,
    }


def _is_wanted(name: str) -> bool:
    """What serving reads; pickled weights are not even downloaded."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in ALL_FILES)


def _fetch(model_id: str, name: str, revision: str | None, target: Path | None, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    found = _asking(
        model_id,
        lambda: hf_hub_download(model_id, name, revision=revision, local_dir=target, endpoint=endpoint),
    )
    return Path(found)


def _asking(model_id: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # the hub's client raises HTTP, OS and value errors without a common root
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubFailed(f"{model_id} could not be fetched: {reason}") from error


def _check(model_id: str, entry: Any, path: Path) -> None:
    """A large file has a sha256 at the hub, any other its git hash."""
    if entry.lfs is not None:
        expected, digest = entry.lfs.sha256, hashlib.sha256()
    else:
        expected, digest = entry.blob_id, hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    if expected is not None and digest.hexdigest() != expected:
        path.resolve().unlink()  # the cached bytes, not the link to them alone
        path.unlink(missing_ok=True)
        raise ChecksumMismatch(
            f"{entry.rfilename} of {model_id} arrived as {digest.hexdigest()}, the hub says {expected}"
        )
