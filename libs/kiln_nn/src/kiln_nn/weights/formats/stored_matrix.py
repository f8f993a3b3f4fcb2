"""A quantised matrix of a checkpoint, in the parts that its format stores it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kiln_nn.errors import CheckpointMismatch, UnsupportedQuantization, name_list
from kiln_nn.kernels.quantised import QuantisedMatrix, Scheme
from kiln_nn.weights.checkpoint_files import Stored, StoredTensor


class StoredFormat(Protocol):
    """How one kind of quantised checkpoint stores a matrix `[O, I]`.

    `scheme`: what `read` gives; None where the scheme here cannot hold it, and `read` gives a tensor.
    `parts`: what follows the module's path in the names of the tensors, all of which must be there.
    `scales`: the part whose format the scales keep.
    """

    @property
    def scheme(self) -> Scheme | None: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def scales(self) -> str: ...

    def shape(self, first_part: tuple[int, ...]) -> tuple[int, int]:
        """(O, I), by the shape of the first of the parts."""

    def shapes(self, num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
        """What shape each of the parts has then."""

    def read(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix | torch.Tensor:
        """The matrix, or the weights as float32.

        Raises:
            UnsupportedQuantization: the values use what cannot be held; `name` is for the message.
        """


@dataclass(frozen=True)
class StoredMatrix:
    """One quantised matrix of the checkpoint."""

    name: str
    format: StoredFormat
    parts: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.format.shape(self.parts[self.format.parts[0]].shape)

    @property
    def tensors(self) -> Sequence[StoredTensor]:
        return [self.parts[part] for part in self.format.parts]

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are where they are not held quantised."""
        stored = self.parts[self.format.scales].dtype
        return torch.float16 if stored == torch.float16 else torch.bfloat16

    @property
    def scales_dtype(self) -> torch.dtype:
        """Half-precision scales become float32: the arena's other format, bfloat16, has fewer bits."""
        stored = self.parts[self.format.scales].dtype
        return torch.bfloat16 if stored == torch.bfloat16 and self.format.scheme == "int4" else torch.float32

    def read(self, tensors: Sequence[torch.Tensor]) -> QuantisedMatrix | torch.Tensor:
        """The matrix out of its `tensors`' values."""
        return self.format.read(self.name, dict(zip(self.format.parts, tensors, strict=True)))


def gather_matrices(stored: Mapping[str, StoredTensor], format: StoredFormat | None) -> dict[str, Stored]:
    """The checkpoint's tensors, the parts of each quantised matrix gathered under its weight's name.

    Raises:
        CheckpointMismatch: a matrix lacks a part, or one has another shape than the others ask for.
    """
    if format is None:
        return dict(stored)
    # The first part alone tells a quantised matrix, by its name or, where that is "weight", by its format.
    first = format.parts[0]
    modules = [
        name.removesuffix(f".{first}")
        for name, tensor in stored.items()
        if name.endswith(f".{first}") and tensor.dtype_name in ("I32", "F8_E4M3")
    ]
    gathered: dict[str, Stored] = dict(stored)
    for module in modules:
        names = {part: f"{module}.{part}" for part in format.parts}
        if missing := [name for name in names.values() if name not in stored]:
            raise CheckpointMismatch(f"{module} is quantised, but lacks {name_list(missing)}")
        parts = {part: stored[name] for part, name in names.items()}
        for name in names.values():
            gathered.pop(name)
        gathered[f"{module}.weight"] = _checked(StoredMatrix(f"{module}.weight", format, parts))
    return gathered


def _checked(matrix: StoredMatrix) -> StoredMatrix:
    if any(len(tensor.shape) > 2 for tensor in matrix.tensors) or len(matrix.tensors[0].shape) != 2:
        raise CheckpointMismatch(f"{matrix.name} is quantised, but its parts are no matrices")
    for tensor, shape in zip(matrix.tensors, matrix.format.shapes(*matrix.shape), strict=True):
        if tensor.shape != shape:
            raise CheckpointMismatch(f"{tensor.stored_name} is {list(tensor.shape)} instead of {list(shape)}")
    return matrix


def require(config: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedQuantization for the first field that has another value than what is read here."""
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise UnsupportedQuantization(f"{where}: {field} is {config[field]!r}, only {value!r} is read")
