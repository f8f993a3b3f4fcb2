"""AWQ checkpoints, as AutoAWQ's "gemm" version writes them: four bits packed along the outputs.

`qweight` int32 `[I, O / 8]`, the eight outputs of a word in an order of its own; `scales`
`[I / 128, O]`; `qzeros` int32 `[I / 128, O / 8]` in the same order.

Zero points of their own are what the format is mostly used with, and what the arena's scheme has no
room for: such weights are read as plain ones, and take a plain one's memory. On a GPU that rounds them
to the scales' format: a product has a few bits more than a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kiln_nn.errors import UnsupportedQuantization
from kiln_nn.kernels.quantised import GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.kernels.quantised.matrix import pack_int4
from kiln_nn.weights.formats.stored_matrix import StoredFormat, require

_SUPPORTED = {"bits": 4, "group_size": GROUP_INPUTS, "version": "gemm"}
# Where the outputs 0, 1, 2 ... of a word lie in it.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_ZERO = 8


@dataclass(frozen=True)
class AwqInt4:
    """`scheme`: None where zero points differ."""

    scheme: Scheme | None
    parts = ("qweight", "scales", "qzeros")
    scales = "scales"

    def shape(self, first_part: tuple[int, ...]) -> tuple[int, int]:
        return first_part[1] * WORD_INPUTS, first_part[0]

    def shapes(self, num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
        num_groups, num_words = num_inputs // GROUP_INPUTS, num_outputs // WORD_INPUTS
        return (num_inputs, num_words), (num_groups, num_outputs), (num_groups, num_words)

    def read(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix | torch.Tensor:
        numbers_IO, zeros_GO = (_in_order(parts[part]) for part in ("qweight", "qzeros"))
        if self.scheme is not None:
            if not (zeros_GO == _ZERO).all():
                raise UnsupportedQuantization(f"{name}: zero_point is false, but zero points differ from 8")
            return QuantisedMatrix("int4", pack_int4(numbers_IO.t() - _ZERO), parts["scales"].t())
        grouped_GJO = (numbers_IO.unflatten(0, (-1, GROUP_INPUTS)) - zeros_GO[:, None]).float()
        return (grouped_GJO * parts["scales"].float()[:, None]).flatten(0, 1).t()


def from_config(config: Mapping[str, Any]) -> StoredFormat:
    """The format of a `quantization_config`.

    Raises:
        UnsupportedQuantization: names the field that is different from what is read here.
    """
    require({**config, "version": str(config.get("version", "gemm")).lower()}, _SUPPORTED, "AWQ")
    return AwqInt4(None if config.get("zero_point", True) else "int4")


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """The numbers 0 to 15 of words, int32 `[rows, 8 * words]`, by output."""
    return torch.stack([(words >> (4 * place)) & 15 for place in _PLACES], dim=-1).flatten(1)
