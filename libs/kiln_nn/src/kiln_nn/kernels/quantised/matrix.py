"""A quantised matrix: small numbers and the scales that make weights of them.

`fp8`: one E4M3 number a weight and one scale an output. `int4`: four bits a weight, stored as the
number plus eight, and one scale for 128 inputs of an output. Of every 64 inputs word `w` of eight has
inputs `w`, `8 + w`, …, `56 + w`, the first in its lowest bits: what one thread of a tensor-core
product needs lies in words of its own. `transposed_words` turns that into the "pack-quantized" layout
of compressed-tensors and back, where a word has eight consecutive inputs.
Outputs are rows in both, so rows can be sliced, and matrices that lie back to back are one.

Legend: `I` inputs, `O` outputs, `G` groups of inputs, `W` words or numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton

Scheme = Literal["fp8", "int4"]
FP8 = torch.float8_e4m3fn
WORD_INPUTS = 8  # four-bit numbers in a word
GROUP_INPUTS = 128  # inputs of an output that share a scale
_ZERO = 8  # what a stored four-bit number is above the number


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """Stands where a weight `[O, I]` stands.

    `values`: fp8 `float8_e4m3fn [O, I]`, int4 `int32 [O, I / 8]`.
    `scales`: fp8 `float32 [O, 1]`, int4 `bfloat16` or `float32` `[O, I / 128]`.

    Raises:
        ShapeMismatch: `scales` does not fit `values`.
    """

    scheme: Scheme
    values: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        num_outputs, num_inputs = self.shape
        num_groups = 1 if self.scheme == "fp8" else num_inputs // GROUP_INPUTS
        check_shape("scales", self.scales, (num_outputs, num_groups))
        if self.scheme == "int4":
            check_shape("values", self.values, (num_outputs, num_groups * GROUP_INPUTS // WORD_INPUTS))

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)` of the weight."""
        num_outputs, width = self.values.shape
        return num_outputs, width * (WORD_INPUTS if self.scheme == "int4" else 1)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> QuantisedMatrix:
        """Outputs `start` to `stop` as a view."""
        return QuantisedMatrix(self.scheme, self.values[start:stop], self.scales[start:stop])

    def numbers(self) -> torch.Tensor:
        """What the weights are before they are scaled, float32 `[O, I]`."""
        if self.scheme == "fp8":
            return self.values.float()
        return (_nibbles(transposed_words(self.values)).flatten(1) - _ZERO).float()

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[O, I]`: products in float32, rounded once."""
        if takes_triton(self.values, self.scales):
            from kiln_nn.kernels.quantised import triton

            return triton.dequantise(self, dtype)
        grouped = self.numbers().unflatten(1, (self.scales.shape[1], -1))
        return (grouped * self.scales.float()[..., None]).flatten(1).to(dtype)


def pack_int4(numbers_OI: torch.Tensor) -> torch.Tensor:
    """Whole numbers of -8 to 7, inputs in whole groups, as words `int32 [O, I / 8]`."""
    nibbles = (numbers_OI.to(torch.int32) + _ZERO).unflatten(1, (-1, WORD_INPUTS))
    return transposed_words(_words(nibbles))


def transposed_words(words_OW: torch.Tensor) -> torch.Tensor:
    """Number `i` of word `w` and number `w` of word `i` in each other's place, in every eight words."""
    blocks = _nibbles(words_OW).unflatten(1, (-1, WORD_INPUTS))
    return _words(blocks.transpose(2, 3).flatten(1, 2))


def word_order(x_TI: torch.Tensor) -> torch.Tensor:
    """Inputs, in whole 64, in the order in which masks lay bare the numbers of words as bytes.

    Those of word `w` at even places are inputs `w`, `16 + w`, `32 + w` and `48 + w`, at odd ones `8 + w` and
    so on: input `16 j + e` becomes number `4 e + j` of 64.
    """
    return x_TI.unflatten(1, (-1, 4, 16)).transpose(2, 3).flatten(1)


def _nibbles(words_OW: torch.Tensor) -> torch.Tensor:
    """The eight stored numbers of each word, `[O, W, 8]`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words_OW.device)
    return (words_OW[..., None] >> shifts) & 15


def _words(nibbles_OW8: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=nibbles_OW8.device)
    return (nibbles_OW8 << shifts).sum(-1, dtype=torch.int32)
