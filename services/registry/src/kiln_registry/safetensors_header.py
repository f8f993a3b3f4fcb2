"""Reads what a safetensors file says about itself, and scans its numbers, without torch.

The file is untrusted. Layout: 8 bytes little-endian header length, a JSON header, then the data,
in which the tensors lie back to back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kiln_registry.domain import InvalidSafetensors, PickleRefused, UnsupportedDtype

MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_TENSORS = 100_000
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
# All exponent bits set means NaN or infinity.
_EXPONENT_MASKS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
_SCAN_ITEMS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file; `start` and `end` are byte offsets from the file's beginning."""

    name: str
    dtype: str  # "F32", "BF16" or "F16"
    shape: tuple[int, ...]
    start: int
    end: int


def read_entries(path: Path) -> list[TensorEntry]:
    """Every tensor of the file, in the order of its bytes.

    Raises:
        PickleRefused: it is a pickle, a zip (torch.save) or a gzip.
        InvalidSafetensors: it is not a well-formed safetensors file.
        UnsupportedDtype: a tensor is neither float32, bfloat16 nor float16.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(num_bytes - 8, MAX_HEADER_BYTES):
            if prefix.startswith(_PICKLE_STARTS):
                raise PickleRefused("the file is a pickle or an archive, not safetensors")
            raise InvalidSafetensors(
                f"the file of {num_bytes} bytes says its header has {header_bytes} bytes"
            )
        raw = file.read(header_bytes)
    header = _parse_json(raw)
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise InvalidSafetensors(f"the file has {len(header)} tensors, at most {_MAX_TENSORS} are read")
    entries = [_entry(name, fields, 8 + header_bytes) for name, fields in header.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_layout(entries, 8 + header_bytes, num_bytes)
    return entries


def read_stamped(path: Path, key: str, value: str, chunk_bytes: int) -> Iterator[bytes]:
    """The file's bytes with one more entry in its metadata: the same tensors under another hash."""
    with path.open("rb") as file:
        header = _parse_json(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), key: value}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the tensors stay aligned
        yield len(raw).to_bytes(8, "little") + raw
        while chunk := file.read(chunk_bytes):
            yield chunk


def find_non_finite(path: Path, entries: list[TensorEntry]) -> str | None:
    """Name of the first tensor with a NaN or an infinity in it; None when all numbers are finite."""
    for entry in entries:
        kind, mask = _EXPONENT_MASKS[entry.dtype]
        num_items = (entry.end - entry.start) // np.dtype(kind).itemsize
        for first in range(0, num_items, _SCAN_ITEMS):
            offset = entry.start + first * np.dtype(kind).itemsize
            items = np.fromfile(path, kind, count=min(_SCAN_ITEMS, num_items - first), offset=offset)
            if bool(((items & mask) == mask).any()):
                return entry.name
    return None


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidSafetensors(f"the header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise InvalidSafetensors("the header is not a JSON object")
    return header


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _entry(name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InvalidSafetensors(f"the entry of {name[:200]!r} has no dtype, shape or data_offsets") from None
    if dtype not in _ITEM_BYTES:
        raise UnsupportedDtype(f"the tensor {name[:200]!r} has dtype {str(dtype)[:20]}")
    if not isinstance(shape, list) or not all(_is_count(number) for number in (*shape, start, end)):
        raise InvalidSafetensors(f"the entry of {name[:200]!r} has numbers that are not counts")
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise InvalidSafetensors(
            f"the tensor {name[:200]!r} of shape {shape} in {dtype} has {end - start} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _check_layout(entries: list[TensorEntry], data_start: int, num_bytes: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise InvalidSafetensors(f"the tensor {entry.name[:200]!r} does not follow the one before it")
        position = entry.end
    if position != num_bytes:
        raise InvalidSafetensors(f"the tensors end at byte {position}, the file at {num_bytes}")
