"""A multipart upload of an adapter, from the request to two files in a temporary folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from kiln_common.errors import InvalidRequest
from kiln_gateway.adapters.archive import (
    CONFIG_NAME,
    MODEL_NAME,
    InvalidArchive,
    refuse_pickle_name,
    store_part,
    unpack_adapter,
)
from kiln_gateway.errors import BodyTooLarge, InvalidField

_FIELDS = ("name", "attach")
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_MAX_PARTS = 8
_MAX_FIELD_BYTES = 4096
_HINT = "Send multipart/form-data with `name`, optionally `attach`, and the file or the two files."


class InvalidMultipart(InvalidRequest):
    """The upload is not the form that the route reads."""

    code = "invalid_multipart"
    hint = _HINT


@dataclass(frozen=True, slots=True)
class UploadedAdapter:
    """What was uploaded: the name to publish under, and the folder with the two files."""

    name: str
    attach: bool
    config_json: str
    safetensors_path: Path


async def receive_upload(request: Request, folder: Path, limit_bytes: int) -> UploadedAdapter:
    """Read the request into `folder`, which the caller removes.

    Raises:
        InvalidMultipart, BodyTooLarge, UnsafeArchive, InvalidArchive, PickleRefused, InvalidField
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidMultipart("the body is not multipart/form-data")
    parser = MultiPartParser(
        request.headers,
        limited(request, limit_bytes),
        max_files=_MAX_PARTS,
        max_fields=_MAX_PARTS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidMultipart(f"the multipart body cannot be read: {error}") from error
    try:
        return await asyncio.to_thread(_store, form, folder, limit_bytes)
    finally:
        await form.close()


async def limited(request: Request, limit_bytes: int) -> AsyncGenerator[bytes]:
    """The body in pieces. Raises BodyTooLarge."""
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        yield part


def _store(form: FormData, folder: Path, limit_bytes: int) -> UploadedAdapter:
    name, attach = "", False
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            _store_file(field, value, folder, limit_bytes)
        elif field == "name":
            name = value
        elif field == "attach":
            attach = _to_bool(value)
        else:
            raise InvalidField(
                "unknown_field", f"there is no field `{field[:60]}`", param=field[:60], hint=_HINT
            )
    if not name:
        raise InvalidField("missing_field", "`name` is missing", param="name", hint=_HINT)
    for file_name in (CONFIG_NAME, MODEL_NAME):
        if not (folder / file_name).is_file():
            raise InvalidArchive(f"the upload has no {file_name}")
    try:
        config_json = (folder / CONFIG_NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArchive(f"{CONFIG_NAME} is not UTF-8 text") from error
    return UploadedAdapter(name, attach, config_json, folder / MODEL_NAME)


def _store_file(field: str, upload: UploadFile, folder: Path, limit_bytes: int) -> None:
    """An archive, or one of the two files by its file name or field name."""
    file_name = Path(upload.filename or "").name
    refuse_pickle_name(file_name)
    if file_name.endswith(_ARCHIVE_SUFFIXES):
        unpack_adapter(upload.file, folder, limit_bytes)
        return
    for stored in (CONFIG_NAME, MODEL_NAME):
        if file_name == stored or Path(stored).suffix == Path(file_name).suffix:
            store_part(stored, upload.file, folder)
            return
    raise InvalidArchive(f"the part {field[:60]!r} has the file name {file_name[:60]!r}")


def _to_bool(value: str) -> bool:
    if value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0", ""):
        return False
    raise InvalidField("invalid_value", f"`attach` is {value[:20]!r}", param="attach", hint="true or false")
