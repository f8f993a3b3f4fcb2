"""The matrices of a stored adapter as numbers, read one linear layer at a time. No torch.

Legend: `r` rank, `I` inputs and `O` outputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kiln_registry.inspection import pair_up
from kiln_registry.safetensors_header import TensorEntry, read_entries

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one layer's weight: scaling * b_Or @ a_rI."""

    a_rI: Matrix
    b_Or: Matrix
    scaling: float


class AdapterFile:
    """An adapter_model.safetensors that has passed inspection, with the scaling its config gives it."""

    def __init__(self, path: Path, scaling: float) -> None:
        self._path = path
        self._scaling = scaling
        self._sides = pair_up(read_entries(path))

    @property
    def module_paths(self) -> list[str]:
        """Such as "model.layers.0.mlp.gate_proj", in the order of the file."""
        return [*self._sides]

    def path_in_file(self, module_path: str) -> str:
        """The layer's path as the file writes it: multimodal checkpoints have other ones."""
        name = self._sides[module_path]["A"].name
        return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

    def read(self, module_path: str) -> Update | None:
        """The update of one layer; None where this adapter leaves the layer alone."""
        sides = self._sides.get(module_path)
        if sides is None:
            return None
        return Update(self._read(sides["A"]), self._read(sides["B"]), self._scaling)

    def _read(self, entry: TensorEntry) -> Matrix:
        num_bytes = entry.end - entry.start
        raw = np.fromfile(self._path, np.uint8, count=num_bytes, offset=entry.start)
        return to_float64(raw, entry.dtype).reshape(entry.shape)


def to_float64(raw: npt.NDArray[np.uint8], dtype: str) -> Matrix:
    """Numbers of a safetensors file; `dtype` is "F32", "F16" or "BF16"."""
    if dtype == "BF16":  # numpy has none: they are the upper halves of float32 numbers
        widened = raw.view(np.uint16).astype(np.uint32) << 16
        return widened.view(np.float32).astype(np.float64)
    return raw.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float64)
