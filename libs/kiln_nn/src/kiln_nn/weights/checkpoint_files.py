"""What a checkpoint folder holds, from file headers alone: names, shapes and types, no values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from kiln_nn.errors import (
    LASTING_FILE_ERRORS,
    CheckpointMismatch,
    CheckpointNotRead,
    CheckpointUnreadable,
    ModelNotFound,
    UnsafeCheckpoint,
    UnsupportedModel,
    name_list,
)
from kiln_nn.weights.names import EMBEDDING, HEAD, TensorSpec, canonical_name

INDEX_FILE = "model.safetensors.index.json"
_PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ITEM_BYTES = {"F8_E4M3": 1, "I32": 4, "I64": 8} | {name: dtype.itemsize for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk, and its form there (`dtype_name` as safetensors spells it)."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        """Raises UnsupportedModel for integer, 8-bit and other formats that are not computed here."""
        if self.dtype_name not in _DTYPES:
            raise UnsupportedModel(
                f"{self.stored_name} is stored as {self.dtype_name}, only {', '.join(_DTYPES)} are read"
            )
        return _DTYPES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        """Bytes of its values on disk. Raises UnsupportedModel as `dtype`."""
        item_bytes = _ITEM_BYTES.get(self.dtype_name) or self.dtype.itemsize
        return math.prod(self.shape) * item_bytes

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """What is read of the disk: itself."""
        return (self,)


def scan_folder(folder: Path) -> tuple[dict[str, StoredTensor], int]:
    """All tensors by canonical name, and how many of a vision tower were left out.

    Raises:
        ModelNotFound, UnsafeCheckpoint: there are no safetensors files.
        CheckpointUnreadable: a file or the index is damaged, or a shard is missing.
        CheckpointNotRead: the file system failed.
        CheckpointMismatch: two stored tensors have the same canonical name.
    """
    stored: dict[str, StoredTensor] = {}
    num_vision_tensors = 0
    for path, promised_names in _weight_files(folder).items():
        tensors = _read_header(path)
        if absent := sorted(promised_names - tensors.keys()):
            raise CheckpointUnreadable(
                f"{INDEX_FILE} places {name_list(absent)} in {path.name}, which lacks it"
            )
        for stored_name, tensor in tensors.items():
            name = canonical_name(stored_name)
            if name is None:
                num_vision_tensors += 1
            elif name in stored:
                raise CheckpointMismatch(
                    f"{name} is stored twice, as {stored[name].stored_name} and {stored_name}"
                )
            else:
                stored[name] = tensor
    return stored, num_vision_tensors


class Stored(Protocol):
    """A tensor of the model as the checkpoint has it: as such, or quantised and in several parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def tensors(self) -> Sequence[StoredTensor]: ...


def check_against(stored: Mapping[str, Stored], expected: Mapping[str, TensorSpec], is_tied: bool) -> None:
    """Compare what is there with what must be there; a tied head may be stored once more.

    Raises:
        CheckpointMismatch: names every missing, unexpected and misshapen tensor (the first few).
    """
    surplus = {HEAD} if is_tied else set()
    missing = [name for name in expected if name not in stored]
    unexpected = sorted(stored.keys() - expected.keys() - surplus)
    misshapen = [
        f"{name} is {list(stored[name].shape)} instead of {list(spec.shape)}"
        for name, spec in expected.items()
        if name in stored and stored[name].shape != spec.shape
    ]
    if is_tied and HEAD in stored and stored[HEAD].shape != expected[EMBEDDING].shape:
        misshapen.append(f"{HEAD} is {list(stored[HEAD].shape)}, tied to {list(expected[EMBEDDING].shape)}")
    parts = [
        f"{label}: {name_list(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if parts:
        raise CheckpointMismatch("the checkpoint's tensors do not fit its config.json; " + "; ".join(parts))


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Every weight file with the stored names that the index promises in it (none without an index)."""
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if (folder / "model.safetensors").is_file():
        return {folder / "model.safetensors": set()}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: set()}
    if found:
        names = name_list([path.name for path in found])
        raise CheckpointUnreadable(f"{folder} has several weight files ({names}) but no {INDEX_FILE}")
    if pickled := sorted(path.name for pattern in _PICKLED_PATTERNS for path in folder.glob(pattern)):
        raise UnsafeCheckpoint(f"{folder} holds pickled weights only ({name_list(pickled)})")
    raise ModelNotFound(f"{folder} holds no *.safetensors file")


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        promised: dict[Path, set[str]] = {}
        for stored_name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise ValueError(f"{file_name!r} is not a plain file name")
            promised.setdefault(folder / file_name, set()).add(stored_name)
    except (*LASTING_FILE_ERRORS, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointUnreadable(f"{folder / INDEX_FILE} is malformed: {error}") from error
    except OSError as error:
        raise CheckpointNotRead(f"{folder / INDEX_FILE} could not be read: {error}") from error
    for path in promised:
        if path.suffix != ".safetensors":
            raise UnsafeCheckpoint(f"{INDEX_FILE} names {path.name}, which is not a safetensors file")
        if not path.is_file():
            raise CheckpointUnreadable(f"{INDEX_FILE} names {path.name}, which is not in the folder")
    return promised


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        path.open("rb").close()  # safe_open calls whatever opening fails of a missing file
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, *LASTING_FILE_ERRORS) as error:
        raise CheckpointUnreadable(f"{path.name} is not a readable safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointNotRead(f"{path} could not be read: {error}") from error
