"""Where the matrices of an adapter lie in its safetensors file, checked against the base model.

Nothing here makes a tensor of a matrix: an engine that is given a new version reads its header
(a few tens of kilobytes, the same for every version of an adapter) and moves the rest as one piece.

File format: 8 bytes little-endian header length, a JSON header, then the tensors back to back
(safetensors, format of its version 0.x).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidAdapter, UnsupportedAdapter, name_list
from kiln_nn.lora.peft_config import PeftConfig, parse_config
from kiln_nn.lora.spec import LoraSpec, adapter_table, lora_shapes, mtp_table
from kiln_nn.weights.names import canonical_name

KEY_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(KEY_PREFIX) + r"(?P<path>.+)\.(?P<side>lora_[AB])\.weight")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ADAPTER_DTYPES = tuple(_DTYPES.values())
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of the file; `start` is its first byte's distance from the end of the header."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """An adapter of the base model, but for its numbers.

    `matrices`: module path -> A [rank, in], B [out, rank]. Layers may be left out (PEFT's
    layers_to_transform): those stay the base's. `mtp_matrices` are those of the multi-token-prediction
    layers: of all their linear layers, or of none. Offsets count from `data_start`.
    """

    spec: LoraSpec
    base_model_name: str
    matrices: Mapping[str, tuple[Matrix, Matrix]]
    mtp_matrices: Mapping[str, tuple[Matrix, Matrix]]
    data_start: int

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The number format of all matrices; None when they have several."""
        found = {matrix.dtype for matrix in self._in_file_order}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def pairs(self) -> Mapping[str, tuple[Matrix, Matrix]]:
        """All of them: the main model's, then those of the multi-token-prediction layers."""
        return {**self.matrices, **self.mtp_matrices}

    @cached_property
    def _in_file_order(self) -> list[Matrix]:
        return in_file_order(self.pairs.values())

    def views(self, file_u8: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Every matrix as a tensor over the file's bytes; copied where they are not aligned."""
        data_u8 = file_u8[self.data_start :]
        return {path: (_view(a, data_u8), _view(b, data_u8)) for path, (a, b) in self.pairs.items()}

    def check_values(self, file_u8: torch.Tensor) -> None:
        """Raises InvalidAdapter if a number is NaN or infinite; names its matrix."""
        data_u8 = file_u8[self.data_start :]
        matrices = self._in_file_order
        if self.dtype is not None:  # the common case, in one pass
            first, last = matrices[0], matrices[-1]
            num_items = (last.start + last.nbytes - first.start) // first.dtype.itemsize
            matrices = [Matrix("", first.start, (num_items,), first.dtype)]
        if not all(_is_finite(_view(matrix, data_u8)) for matrix in matrices):
            bad = (m.name for m in self._in_file_order if not _is_finite(_view(m, data_u8)))
            raise InvalidAdapter(f"{next(bad)} holds NaN or infinity")


def in_file_order(pairs: Iterable[tuple[Matrix, Matrix]]) -> list[Matrix]:
    """Both matrices of each pair, by where they lie."""
    return sorted(chain.from_iterable(pairs), key=lambda matrix: matrix.start)


def file_header(file_u8: torch.Tensor) -> bytes:
    """The JSON header of a safetensors file. Raises InvalidAdapter if there is none."""
    num_bytes = int.from_bytes(file_u8[:_LENGTH_BYTES].numpy().tobytes(), "little")
    most = min(len(file_u8) - _LENGTH_BYTES, _MOST_HEADER_BYTES)
    if num_bytes > most:
        raise _not_safetensors(f"{len(file_u8)} bytes with a header of {num_bytes}")
    return file_u8[_LENGTH_BYTES : _LENGTH_BYTES + num_bytes].numpy().tobytes()


def read_layout(
    config_text: str | bytes, header: bytes, num_file_bytes: int, model: ModelConfig
) -> AdapterLayout:
    """Read both headers of an adapter and check them against `model`.

    Raises:
        InvalidAdapter: not safetensors; an unknown, missing or misshapen tensor.
        UnsupportedAdapter: a PEFT feature beyond plain LoRA.
    """
    config = parse_config(config_text)
    data_start = _LENGTH_BYTES + len(header)
    entries = _entries(header, num_file_bytes - data_start)
    table, of_mtp = adapter_table(model), mtp_table(model)
    sides = _sort_by_module(entries, {**table, **of_mtp})

    def found(part: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Matrix, Matrix]]:
        return {
            path: _checked_pair(path, sides[path], part[path], config.rank) for path in part if path in sides
        }

    matrices, mtp_matrices = found(table), found(of_mtp)
    if not matrices:
        raise InvalidAdapter("the adapter has no tensors of the main model")
    _check_complete(config, matrices, table)
    if mtp_matrices and mtp_matrices.keys() != of_mtp.keys():
        missing = [path for path in of_mtp if path not in mtp_matrices]
        raise InvalidAdapter(f"the adapter lacks layers of the multi-token prediction: {name_list(missing)}")
    targets = _targets_of(matrices, config, model)
    spec = LoraSpec(config.rank, config.alpha, targets, with_mtp=bool(mtp_matrices))
    return AdapterLayout(spec, config.base_model_name, matrices, mtp_matrices, data_start)


def _view(matrix: Matrix, data_u8: torch.Tensor) -> torch.Tensor:
    part = data_u8[matrix.start : matrix.start + matrix.nbytes]
    if part.storage_offset() % matrix.dtype.itemsize or part.data_ptr() % matrix.dtype.itemsize:
        part = part.clone()
    return part.view(matrix.dtype).view(matrix.shape)


def _is_finite(values: torch.Tensor) -> bool:
    """One pass: the extremes of NaN are NaN."""
    return values.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


def _not_safetensors(reason: str) -> InvalidAdapter:
    return InvalidAdapter(f"adapter_model.safetensors is not a safetensors file: {reason}")


def _entries(header: bytes, num_data_bytes: int) -> dict[str, dict[str, Any]]:
    """The header's tensors, which fill the data without gap or overlap."""
    try:
        raw: Any = json.loads(header)
        raw.pop("__metadata__", None)
        places = sorted((*entry["data_offsets"], entry["shape"]) for entry in raw.values())
        position = 0
        for start, end, shape in places:
            if start != position or end < start or any(type(n) is not int or n < 0 for n in shape):
                raise _not_safetensors(f"a tensor at {start} to {end} after {position} bytes")
            position = end
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_safetensors(f"{type(error).__name__} in its header: {error}") from error
    if position != num_data_bytes:
        raise _not_safetensors(f"{num_data_bytes} bytes of data, its header tells of {position}")
    return raw  # type: ignore[no-any-return]


def _sort_by_module(
    entries: Mapping[str, dict[str, Any]], table: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """lora_A and lora_B by canonical module path; any other key is refused by name."""
    sides: dict[str, dict[str, dict[str, Any]]] = {}
    unknown = []
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        path = canonical_name(match["path"]) if match else None
        if match is None or path is None or path not in table or match["side"] in sides.get(path, {}):
            unknown.append(key)
        else:
            sides.setdefault(path, {})[match["side"]] = entry
    if any("lora_magnitude_vector" in key for key in unknown):
        raise UnsupportedAdapter(f"DoRA is not supported: {name_list(sorted(unknown))}")
    if unknown:
        raise InvalidAdapter(
            f"not tensors of a LoRA on this model's linear layers: {name_list(sorted(unknown))}"
        )
    return sides


def _checked_pair(
    path: str, sides: Mapping[str, dict[str, Any]], size: tuple[int, int], rank: int
) -> tuple[Matrix, Matrix]:
    in_features, out_features = size
    found = []
    for side, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
        name = f"{path}.{side}"
        if side not in sides:
            raise InvalidAdapter(f"{path} lacks its {side}")
        entry = sides[side]
        if tuple(entry["shape"]) != shape:
            raise InvalidAdapter(f"{name} is {entry['shape']} instead of {list(shape)}")
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise InvalidAdapter(f"{name} is {entry.get('dtype')}, a 16- or 32-bit float is needed")
        start, end = entry["data_offsets"]
        matrix = Matrix(name, start, shape, dtype)
        if matrix.nbytes != end - start:
            raise _not_safetensors(f"{name} has {end - start} bytes instead of {matrix.nbytes}")
        found.append(matrix)
    return found[0], found[1]


def _check_complete(
    config: PeftConfig, matrices: Mapping[str, object], table: Mapping[str, tuple[int, int]]
) -> None:
    if not config.covers_all_layers or config.target_modules is None:
        return
    targets = config.target_modules
    missing = [
        path
        for path in table
        if path not in matrices and any(f".{path}".endswith(f".{target}") for target in targets)
    ]
    if missing:
        raise InvalidAdapter(f"target_modules names layers without tensors: {name_list(missing)}")


def _targets_of(
    matrices: Mapping[str, object], config: PeftConfig, model: ModelConfig
) -> Literal["all", "attention", "mlp"] | tuple[str, ...]:
    """The group that the tensors are exactly, or else the linear layers' names."""
    groups: tuple[Literal["all", "attention", "mlp"], ...] = ("all", "attention", "mlp")
    for group in groups:
        if lora_shapes(model, LoraSpec(config.rank, config.alpha, group)).keys() == matrices.keys():
            return group
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in matrices))
