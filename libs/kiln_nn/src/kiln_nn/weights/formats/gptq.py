"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: four bits packed along the inputs.

`qweight` int32 `[I / 8, O]`, the first input in the lowest bits; `scales` `[I / 128, O]`; `qzeros`
int32 `[I / 128, O / 8]`, all of them eight where the method was symmetric (the older of the two forms
stores one less); `g_idx` `[I]`, each input's group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kiln_nn.errors import UnsupportedQuantization
from kiln_nn.kernels.quantised import GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.kernels.quantised.matrix import transposed_words
from kiln_nn.weights.formats.stored_matrix import StoredFormat, require

_SUPPORTED = {"bits": 4, "group_size": GROUP_INPUTS, "sym": True, "desc_act": False}
# What a word of zero points holds eight times.
_STORED_ZERO = {"gptq": 7, "gptq_v2": 8}


@dataclass(frozen=True)
class GptqInt4:
    """`stored_zero`: what stands for the zero point eight."""

    stored_zero: int
    scheme: ClassVar[Scheme] = "int4"
    parts = ("qweight", "scales", "qzeros", "g_idx")
    scales = "scales"

    def shape(self, first_part: tuple[int, ...]) -> tuple[int, int]:
        return first_part[1], first_part[0] * WORD_INPUTS

    def shapes(self, num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
        num_groups = num_inputs // GROUP_INPUTS
        packed = (num_inputs // WORD_INPUTS, num_outputs)
        return packed, (num_groups, num_outputs), (num_groups, num_outputs // WORD_INPUTS), (num_inputs,)

    def read(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        num_inputs = parts["g_idx"].shape[0]
        groups = torch.arange(num_inputs, device=parts["g_idx"].device) // GROUP_INPUTS
        if not torch.equal(parts["g_idx"].long(), groups):
            raise UnsupportedQuantization(f"{name}: g_idx is not in order (desc_act), which is not read")
        if not (_nibbles(parts["qzeros"]) == self.stored_zero).all():
            raise UnsupportedQuantization(f"{name}: zero points are not all in the middle, which is not read")
        # By output, these are words of eight inputs in a row.
        return QuantisedMatrix("int4", transposed_words(parts["qweight"].t()), parts["scales"].t())


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)])


def from_config(config: Mapping[str, Any]) -> StoredFormat:
    """The format of a `quantization_config`.

    Raises:
        UnsupportedQuantization: names the field that is different from what is read here.
    """
    require(config, _SUPPORTED, "GPTQ")
    form = config.get("checkpoint_format") or "gptq"
    if form not in _STORED_ZERO:
        raise UnsupportedQuantization(
            f"GPTQ: checkpoint_format {form!r} is not one of {', '.join(_STORED_ZERO)}"
        )
    # A pattern that begins with "-:" leaves modules unquantised, which their tensors show as well.
    if others := [pattern for pattern in config.get("dynamic") or {} if not pattern.startswith("-:")]:
        raise UnsupportedQuantization(f"GPTQ: some modules have a form of their own ({others[0]})")
    return GptqInt4(_STORED_ZERO[form])
