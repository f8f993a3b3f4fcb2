"""Adapters as files on this machine."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import kiln
from kiln_cli.adapters.references import parse
from kiln_cli.errors import ChecksumMismatch, FileUnreadable

_WEIGHTS = "adapter_model.safetensors"


def upload(client: kiln.Client, source: Path, name: str, attach: bool) -> kiln.AdapterVersion:
    """Raises FileUnreadable where there is no such folder or file, or the folder lacks one of its files."""
    try:
        return client.adapters.upload(name, source.expanduser(), attach=attach)
    except OSError as error:
        raise FileUnreadable(f"{error.filename or source} cannot be read: {error.strerror}") from None


def download(client: kiln.Client, reference: str, output: Path | None) -> dict[str, Any]:
    """Write the archive and compare its weights with the hash that the registry has for the version.

    Raises:
        FileUnreadable: the file cannot be written.
        ChecksumMismatch: the weights are not those of the version; the file is removed.
    """
    name, version = parse(reference)
    adapter = client.adapters.get(name)
    version = version or adapter.latest_version
    known = {entry.version: entry.sha256 for entry in adapter.versions}
    target = (output or Path(f"{name}.tar.gz")).expanduser()
    try:
        client.adapters.download(name, target, version)
    except OSError as error:
        raise FileUnreadable(f"{target} cannot be written: {error.strerror}") from None
    found = _weights_sha256(target)
    if found != known.get(version or 0):
        target.unlink()
        raise ChecksumMismatch(f"the weights of {name}@{version} arrived with sha256 {found}")
    return {
        "file": str(target),
        "adapter": f"{name}@{version}",
        "sha256": found,
        "bytes": target.stat().st_size,
    }


def _weights_sha256(archive: Path) -> str | None:
    digest = hashlib.sha256()
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if Path(member.name).name == _WEIGHTS else None
            if file is not None:
                while piece := file.read(2**20):
                    digest.update(piece)
                return digest.hexdigest()
    return None
