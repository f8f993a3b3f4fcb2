"""Adapter archives: read without trusting them, written for download."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from kiln_common.errors import InvalidRequest
from kiln_gateway.errors import BodyTooLarge

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

_MAX_MEMBERS = 64
_MAX_CONFIG_BYTES = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
# A zip as torch.save writes it, and pickle protocols 2 to 5 on their own.
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class UnsafeArchive(InvalidRequest):
    """An archive that would write elsewhere, or that holds more than plain files and folders."""

    code = "unsafe_archive"
    hint = f"Pack a folder with {CONFIG_NAME} and {MODEL_NAME} as plain files: tar czf adapter.tar.gz FOLDER."


class InvalidArchive(InvalidRequest):
    """What was uploaded is neither an archive nor the two files of an adapter."""

    code = "invalid_archive"
    hint = f"Send a tar.gz of the PEFT folder, or {MODEL_NAME} and {CONFIG_NAME} as two parts."


class PickleRefused(InvalidRequest):
    """The adapter's weights are pickled, and unpickling runs whatever code is in the file."""

    code = "pickle_refused"
    hint = "Save the adapter as safetensors; a pickle can run code when it is read."


class _LimitedReader(io.RawIOBase):
    """Reads at most `limit_bytes` of what an archive unpacks to, then raises BodyTooLarge."""

    def __init__(self, source: IO[bytes], limit_bytes: int) -> None:
        self._source = source
        self._limit_bytes = limit_bytes
        self._num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._num_bytes += len(data)
        if self._num_bytes > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)
        return data


def unpack_adapter(archive: IO[bytes], folder: Path, limit_bytes: int) -> None:
    """Write the archive's config and tensors into `folder`, nothing else and nowhere else.

    `archive` is a tar, gzipped or not. `limit_bytes` bounds what it may unpack to.

    Raises:
        UnsafeArchive: absolute paths, "..", links, devices, or too many members.
        PickleRefused: the weights are a pickle.
        InvalidArchive: not an archive, or one of the two files is missing or there twice.
        BodyTooLarge: it unpacks to more than limit_bytes.
    """
    magic = archive.read(len(_GZIP_MAGIC))
    archive.seek(0)
    source = gzip.GzipFile(fileobj=archive, mode="rb") if magic == _GZIP_MAGIC else archive
    limited = _LimitedReader(source, limit_bytes)  # type: ignore[arg-type]
    try:
        with tarfile.open(fileobj=limited, mode="r|") as tar:  # type: ignore[call-overload]
            for number, member in enumerate(tar):
                if number >= _MAX_MEMBERS:
                    raise UnsafeArchive(f"the archive has more than {_MAX_MEMBERS} members")
                _take_member(tar, member, folder, limit_bytes)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InvalidArchive(f"the archive cannot be read: {error}") from error
    for name in (CONFIG_NAME, MODEL_NAME):
        if not (folder / name).is_file():
            raise InvalidArchive(f"the archive has no {name}")


def _take_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, limit_bytes: int) -> None:
    path = PurePosixPath(member.name)
    shown = member.name[:100]
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise UnsafeArchive(f"the archive has a member {shown!r}")
    if member.isdir():
        return
    if not member.isreg():
        raise UnsafeArchive(f"the archive's member {shown!r} is not a plain file")
    if member.size > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    refuse_pickle_name(path.name)
    if path.name not in (CONFIG_NAME, MODEL_NAME):
        return
    source = tar.extractfile(member)
    if source is None or (folder / path.name).exists():
        raise InvalidArchive(f"the archive has {path.name} more than once")
    store_part(path.name, source, folder)


def store_part(name: str, source: IO[bytes], folder: Path) -> None:
    """Write one of the two files. Raises PickleRefused, InvalidArchive (a config too large)."""
    if name == CONFIG_NAME:
        content = source.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise InvalidArchive(f"{CONFIG_NAME} is larger than {_MAX_CONFIG_BYTES} bytes")
        (folder / name).write_bytes(content)
        return
    head = source.read(8)
    if head.startswith(_PICKLE_MAGICS):
        raise PickleRefused(f"{name} holds a pickle, not safetensors")
    with (folder / name).open("wb") as target:
        target.write(head)
        shutil.copyfileobj(source, target, 1024 * 1024)


def refuse_pickle_name(name: str) -> None:
    """Raises PickleRefused."""
    if PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES:
        raise PickleRefused(f"{name[:100]!r} is a pickle")


def pack_adapter(config_json: str, safetensors: bytes, folder_name: str) -> bytes:
    """A tar.gz of the PEFT folder; the same bytes each time."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name, content in ((CONFIG_NAME, config_json.encode()), (MODEL_NAME, safetensors)):
            member = tarfile.TarInfo(f"{folder_name}/{name}")
            member.size = len(content)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
