"""An upload of a dataset, from the request to a checked file in a temporary folder."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from kiln_gateway.adapters.upload import InvalidMultipart, limited
from kiln_gateway.datasets.rows import FORMATS, DatasetFormat, RowChecker
from kiln_gateway.errors import InvalidField

_HINT = "Send the file's lines as the body, or multipart/form-data with `file`, and optionally `name` and `format`."
_FIELDS = ("name", "format")
_MAX_FIELD_BYTES = 4096
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class UploadedDataset:
    """A file whose every line is a row of `format`."""

    path: Path
    name: str
    format: DatasetFormat
    num_rows: int
    sha256: str


async def receive_dataset(
    request: Request, folder: Path, limit_bytes: int, name: str, format: str
) -> UploadedDataset:
    """Read the request into `folder`, which the caller removes; `name` and `format` may also be form fields.

    Nothing of the file is kept in memory but the line at hand.

    Raises:
        InvalidDataset with every broken line, EmptyDataset, BodyTooLarge, InvalidMultipart, InvalidField.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await _store(limited(request, limit_bytes), folder, name, format)
    parser = MultiPartParser(
        request.headers,
        limited(request, limit_bytes),
        max_files=1,
        max_fields=2,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidMultipart(f"the multipart body cannot be read: {error}", hint=_HINT) from error
    try:
        fields = {"name": name, "format": format}
        file: UploadFile | None = None
        for field, value in form.multi_items():
            if isinstance(value, UploadFile):
                file = value
            elif field in _FIELDS:
                fields[field] = value
            else:
                raise InvalidField(
                    "unknown_field", f"there is no field `{field[:60]}`", param=field[:60], hint=_HINT
                )
        if file is None:
            raise InvalidField("missing_field", "`file` is missing", param="file", hint=_HINT)
        return await _store(
            _chunks(file.file), folder, fields["name"] or file.filename or "", fields["format"]
        )
    finally:
        await form.close()


async def _chunks(file: IO[bytes]) -> AsyncGenerator[bytes]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield chunk


async def _store(chunks: AsyncGenerator[bytes], folder: Path, name: str, format: str) -> UploadedDataset:
    if format and format not in FORMATS:
        raise InvalidField(
            "invalid_value",
            f"`format` is {format[:40]!r}",
            param="format",
            hint=f"Known are {', '.join(FORMATS)}.",
        )
    checker = RowChecker(cast(DatasetFormat, format) if format else None)
    digest = hashlib.sha256()
    path = folder / "dataset.jsonl"
    with path.open("wb") as file:

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)
            checker.feed(chunk)

        async for chunk in chunks:
            await asyncio.to_thread(take, chunk)
    found = await asyncio.to_thread(checker.finish)
    return UploadedDataset(path, name[:256], found, checker.num_rows, digest.hexdigest())
