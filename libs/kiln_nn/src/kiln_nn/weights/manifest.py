"""The description of a weight arena that engine and trainer both read: where every tensor lies.

It travels between processes as JSON (never as a pickle), so what arrives is checked before a
view is built from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.errors import CheckpointMismatch, CheckpointUnreadable, UnsupportedModel
from kiln_nn.weights.names import EMBEDDING, HEAD, TensorSpec

EntryKind = Literal["own", "row_slice", "alias"]
Transport = Literal["memfd", "cuda_vmm", "cuda_ipc"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ALIGNMENT_BYTES = 256  # what device allocators give, and enough for any vector load


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the arena.

    `offset` counts bytes from the arena's start, `stride` elements. `source` is the fused tensor
    of which a row_slice is a part, or the tensor whose bytes an alias shows again. `encoding` says how
    the bytes become numbers: "plain" is `dtype`'s own; a quantised layer will name its scheme here,
    and a reader that does not know it refuses instead of misreading.
    """

    name: str
    kind: EntryKind
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    source: str | None = None
    encoding: str = "plain"

    @property
    def nbytes(self) -> int:
        """Bytes from the first to past the last element; tensors are contiguous."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """A whole arena: whose weights, on which device, from which engine boot, and every tensor.

    `config` is what the weights hold, so that a reader needs nothing else of the checkpoint.
    `device_id` is "cpu" or the GPU's UUID. `boot_id` names one life of the engine: a mapping is
    good for exactly that life.
    """

    model_hash: str
    config: ModelConfig
    device_id: str
    boot_id: str
    transport: Transport
    nbytes: int
    entries: tuple[TensorEntry, ...]

    def to_json(self) -> str:
        """Compact JSON, the form that crosses processes."""
        raw = {**asdict(self), "config": self.config.to_hf_dict()}
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what to_json wrote.

        Raises:
            CheckpointUnreadable: a field is missing, or an entry lies outside the arena.
            UnsupportedModel: a tensor has an encoding that is not read here.
        InvalidModelConfig, UnsupportedModel: as ModelConfig.from_dict.
        """
        try:
            raw = json.loads(text)
            entries = tuple(_entry(item) for item in raw.pop("entries"))
            config = ModelConfig.from_dict(raw.pop("config"))
            manifest = cls(**raw, config=config, entries=entries)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointUnreadable(f"the weight manifest is malformed: {error}") from error
        _check_fields(manifest)
        return manifest


def lay_out(
    specs: Mapping[str, TensorSpec], dtypes: Mapping[str, torch.dtype], is_tied: bool
) -> list[TensorEntry]:
    """Place every tensor of `specs` one after the other; a tied head becomes an alias.

    Parts of a fused tensor follow each other without a gap if they share one dtype; otherwise
    each is placed by itself.
    """
    group_dtypes: dict[str, set[torch.dtype]] = {}
    for name, spec in specs.items():
        if spec.fused_name:
            group_dtypes.setdefault(spec.fused_name, set()).add(dtypes[name])
    entries: list[TensorEntry] = []
    end, open_group = 0, None
    for name, spec in specs.items():
        fused = spec.fused_name if spec.fused_name and len(group_dtypes[spec.fused_name]) == 1 else None
        if fused is None or fused != open_group:
            end = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        open_group = fused
        entry = TensorEntry(
            name=name,
            kind="row_slice" if fused else "own",
            offset=end,
            shape=spec.shape,
            stride=contiguous_stride(spec.shape),
            dtype=_dtype_name(dtypes[name]),
            source=fused,
        )
        entries.append(entry)
        end += entry.nbytes
    if is_tied:
        embedding = next(entry for entry in entries if entry.name == EMBEDDING)
        entries.append(
            TensorEntry(
                HEAD, "alias", embedding.offset, embedding.shape, embedding.stride, embedding.dtype, EMBEDDING
            )
        )
    return entries


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a row-major tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def arena_views(entries: tuple[TensorEntry, ...], arena_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    """A view into the arena (flat uint8) for every entry, under its checkpoint name."""
    return {entry.name: _view(arena_u8, entry.offset, entry.shape, entry.dtype) for entry in entries}


def fused_views(entries: tuple[TensorEntry, ...], arena_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fused matrices [sum of rows, columns] over the row slices, under their fused names."""
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        if entry.kind == "row_slice" and entry.source:
            groups.setdefault(entry.source, []).append(entry)
    views = {}
    for name, parts in groups.items():
        num_rows = sum(part.shape[0] for part in parts)
        views[name] = _view(arena_u8, parts[0].offset, (num_rows, *parts[0].shape[1:]), parts[0].dtype)
    return views


def _view(arena_u8: torch.Tensor, offset: int, shape: tuple[int, ...], dtype_name: str) -> torch.Tensor:
    dtype = DTYPES[dtype_name]
    return arena_u8.narrow(0, offset, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointMismatch(f"{dtype} weights are not supported, only {', '.join(DTYPES)}")


def _entry(raw: dict[str, Any]) -> TensorEntry:
    return TensorEntry(**{**raw, "shape": tuple(raw["shape"]), "stride": tuple(raw["stride"])})


def _check_fields(manifest: Manifest) -> None:
    if manifest.transport not in get_args(Transport):
        raise CheckpointUnreadable(f"the weight manifest names the transport {manifest.transport!r}")
    if not isinstance(manifest.nbytes, int) or manifest.nbytes <= 0:
        raise CheckpointUnreadable(f"the weight manifest says the arena has {manifest.nbytes!r} bytes")
    for entry in manifest.entries:
        if entry.encoding != "plain":
            raise UnsupportedModel(
                f"{entry.name} is encoded as {entry.encoding!r}, which cannot be read here"
            )
        numbers = (entry.offset, *entry.shape, *entry.stride)
        is_sound = (
            entry.kind in get_args(EntryKind)
            and entry.dtype in DTYPES
            and all(type(number) is int and number >= 0 for number in numbers)
            and entry.stride == contiguous_stride(entry.shape)
            and entry.offset % DTYPES[entry.dtype].itemsize == 0
            and entry.offset + entry.nbytes <= manifest.nbytes
        )
        if not is_sound:
            raise CheckpointUnreadable(f"the weight manifest's entry {cast(str, entry.name)!r} is unsound")
