"""The description of a weight arena that engine and trainer both read: where every tensor lies.

It travels between processes as JSON (never as a pickle), so what arrives is checked before a
view is built from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal, cast, get_args

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.errors import CheckpointMismatch, CheckpointUnreadable, UnsupportedModel
from kiln_nn.kernels.quantised import GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.weights.names import EMBEDDING, HEAD, TensorSpec

EntryKind = Literal["own", "row_slice", "alias"]
Transport = Literal["memfd", "cuda_vmm", "cuda_ipc"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
SCALES = "scales"
SCALES_SUFFIX = "_scale"
_ENCODINGS = ("plain", SCALES, *get_args(Scheme))
_ALIGNMENT_BYTES = 256  # what device allocators give, and enough for any vector load


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the arena.

    `offset` counts bytes from the arena's start, `stride` elements. `source` is the fused tensor
    of which a row_slice is a part, or the tensor whose bytes an alias shows again. `encoding` says how
    the bytes become numbers: "plain" is `dtype`'s own; a quantised matrix has its scheme here, the
    shape of its packed values, and a second entry of the encoding "scales" under its name and `_scale`.
    A reader that does not know an encoding refuses instead of misreading.
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
class Quantised:
    """That a matrix lies in the arena quantised, and in which format its scales are."""

    scheme: Scheme
    scales_dtype: torch.dtype


Form = torch.dtype | Quantised
"""How a tensor lies in the arena: its numbers as they are, or quantised."""


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


def lay_out(specs: Mapping[str, TensorSpec], forms: Mapping[str, Form], is_tied: bool) -> list[TensorEntry]:
    """Place every tensor of `specs` one after the other; a tied head becomes an alias.

    Parts of a fused tensor that follow each other in one form lie without a gap: of quantised ones
    all values, then all scales. Other tensors are placed by themselves.
    """
    entries: list[TensorEntry] = []
    end = 0
    for fused_name, names in _runs(specs, forms):
        tensors = [(name, specs[name].shape) for name in names]
        form = forms[names[0]]
        if isinstance(form, torch.dtype):
            runs = [_adjacent(tensors, form, "plain", fused_name, end)]
        else:
            values = [(name, _values_shape(form.scheme, shape)) for name, shape in tensors]
            scales = [(name + SCALES_SUFFIX, _scales_shape(form.scheme, shape)) for name, shape in tensors]
            first = _adjacent(values, _values_dtype(form.scheme), form.scheme, fused_name, end)
            fused_scales = fused_name and fused_name + SCALES_SUFFIX
            runs = [first, _adjacent(scales, form.scales_dtype, SCALES, fused_scales, _end(first))]
        entries += [entry for run in runs for entry in run]
        end = _end(entries)
    if is_tied:
        embedding = next(entry for entry in entries if entry.name == EMBEDDING)
        entries.append(replace(embedding, name=HEAD, kind="alias", source=EMBEDDING))
    return entries


def _runs(
    specs: Mapping[str, TensorSpec], forms: Mapping[str, Form]
) -> Iterator[tuple[str | None, list[str]]]:
    """Tensors that belong side by side, and what they are together; None for one alone.

    A fused tensor whose parts have several forms falls apart into runs that are named by their parts.
    """
    for _, run in groupby(specs, lambda name: (specs[name].fused_name or name, forms[name])):
        names = list(run)
        fused_name = specs[names[0]].fused_name
        num_parts = sum(spec.fused_name == fused_name for spec in specs.values()) if fused_name else 1
        if len(names) == 1:
            yield None, names
        elif len(names) == num_parts:
            yield fused_name, names
        else:
            module = names[0].removesuffix(".weight").rpartition(".")[0]
            parts = "+".join(name.removesuffix(".weight").rpartition(".")[2] for name in names)
            yield f"{module}.{parts}.weight", names


def _adjacent(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    encoding: str,
    fused_name: str | None,
    start: int,
) -> list[TensorEntry]:
    """Entries back to back, the first at the next aligned place."""
    offset = -(-start // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    entries: list[TensorEntry] = []
    for name, shape in tensors:
        entries.append(
            TensorEntry(
                name=name,
                kind="row_slice" if fused_name else "own",
                offset=_end(entries) or offset,
                shape=shape,
                stride=contiguous_stride(shape),
                dtype=_dtype_name(dtype),
                source=fused_name,
                encoding=encoding,
            )
        )
    return entries


def _end(entries: Sequence[TensorEntry]) -> int:
    return entries[-1].offset + entries[-1].nbytes if entries else 0


def _values_dtype(scheme: Scheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme == "fp8" else torch.int32


def _values_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    num_outputs, num_inputs = shape
    return (num_outputs, num_inputs if scheme == "fp8" else num_inputs // WORD_INPUTS)


def _scales_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    num_outputs, num_inputs = shape
    return (num_outputs, 1 if scheme == "fp8" else num_inputs // GROUP_INPUTS)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a row-major tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def raw_views(entries: Sequence[TensorEntry], arena_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    """A view into the arena (flat uint8) for every entry: what a loader fills."""
    return {entry.name: _view(arena_u8, entry) for entry in entries}


def arena_views(
    entries: Sequence[TensorEntry], arena_u8: torch.Tensor
) -> dict[str, torch.Tensor | QuantisedMatrix]:
    """Every tensor of the model under its checkpoint name; scales are a part of their matrix."""
    views = raw_views(entries, arena_u8)
    return {
        entry.name: _shown(entry.encoding, views[entry.name], views.get(entry.name + SCALES_SUFFIX))
        for entry in entries
        if entry.encoding != SCALES
    }


def fused_views(
    entries: Sequence[TensorEntry], arena_u8: torch.Tensor
) -> dict[str, torch.Tensor | QuantisedMatrix]:
    """Fused matrices [sum of rows, columns] over the row slices, under their fused names."""
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        if entry.kind == "row_slice" and entry.source:
            groups.setdefault(entry.source, []).append(entry)
    fused = [
        replace(parts[0], name=name, shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
        for name, parts in groups.items()
    ]
    return arena_views(fused, arena_u8)


def _shown(
    encoding: str, values: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor | QuantisedMatrix:
    if encoding == "plain":
        return values
    assert scales is not None
    return QuantisedMatrix(cast("Scheme", encoding), values, scales)


def _view(arena_u8: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    return arena_u8.narrow(0, entry.offset, entry.nbytes).view(DTYPES[entry.dtype]).view(entry.shape)


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
        if entry.encoding not in _ENCODINGS:
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
    _check_pairs({entry.name: entry for entry in manifest.entries})


def _check_pairs(entries: Mapping[str, TensorEntry]) -> None:
    """Every quantised matrix must have the scales that its shape asks for."""
    for entry in entries.values():
        if entry.encoding in ("plain", SCALES):
            continue
        scheme = cast("Scheme", entry.encoding)
        scales = entries.get(entry.name + SCALES_SUFFIX)
        num_inputs = entry.shape[-1] * (WORD_INPUTS if scheme == "int4" else 1)
        if (
            len(entry.shape) != 2
            or DTYPES[entry.dtype] != _values_dtype(scheme)
            or scales is None
            or scales.encoding != SCALES
            or scales.shape != _scales_shape(scheme, (entry.shape[0], num_inputs))
        ):
            raise CheckpointUnreadable(f"the weight manifest has no sound scales for {entry.name!r}")
