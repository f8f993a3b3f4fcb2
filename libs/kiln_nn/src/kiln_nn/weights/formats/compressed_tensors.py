"""compressed-tensors: four bits as "pack-quantized", fp8 as "float-quantized".

The arena has the same numbers and scales; only the order of four-bit numbers within 64 inputs differs.

Source: the format's description in vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from kiln_nn.errors import UnsupportedQuantization
from kiln_nn.kernels.quantised import GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.kernels.quantised.matrix import transposed_words
from kiln_nn.weights.formats.stored_matrix import StoredFormat, require

_WEIGHTS: dict[Scheme, dict[str, Any]] = {
    "int4": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_INPUTS,
    },
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}
_FORMATS: dict[str, Scheme] = {"pack-quantized": "int4", "float-quantized": "fp8"}


class PackedInt4:
    """`weight_packed` int32 `[O, I / 8]`, `weight_scale` `[O, I / 128]`, `weight_shape` (O, I)."""

    scheme: ClassVar[Scheme] = "int4"
    parts = ("weight_packed", "weight_scale", "weight_shape")
    scales = "weight_scale"

    def shape(self, first_part: tuple[int, ...]) -> tuple[int, int]:
        return first_part[0], first_part[1] * WORD_INPUTS

    def shapes(self, num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
        packed = (num_outputs, num_inputs // WORD_INPUTS)
        return packed, (num_outputs, num_inputs // GROUP_INPUTS), (2,)

    def read(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        return QuantisedMatrix("int4", transposed_words(parts["weight_packed"]), parts["weight_scale"])

    def write(self, matrix: QuantisedMatrix) -> dict[str, torch.Tensor]:
        """The parts of a matrix."""
        shape = torch.tensor(matrix.shape, dtype=torch.int64)
        packed = transposed_words(matrix.values)
        return {"weight_packed": packed, "weight_scale": matrix.scales, "weight_shape": shape}


class Fp8PerOutput:
    """`weight` float8_e4m3fn `[O, I]` and `weight_scale` `[O, 1]`."""

    scheme: ClassVar[Scheme] = "fp8"
    parts = ("weight", "weight_scale")
    scales = "weight_scale"

    def shape(self, first_part: tuple[int, ...]) -> tuple[int, int]:
        return first_part[0], first_part[1]

    def shapes(self, num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
        return (num_outputs, num_inputs), (num_outputs, 1)

    def read(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        return QuantisedMatrix("fp8", parts["weight"], parts["weight_scale"].float())

    def write(self, matrix: QuantisedMatrix) -> dict[str, torch.Tensor]:
        """The parts of a matrix."""
        return {"weight": matrix.values, "weight_scale": matrix.scales}


FORMAT_OF: dict[Scheme, PackedInt4 | Fp8PerOutput] = {"int4": PackedInt4(), "fp8": Fp8PerOutput()}


def from_config(config: Mapping[str, Any]) -> StoredFormat:
    """The format of a `quantization_config`.

    Raises:
        UnsupportedQuantization: names the field that is different from what is read here.
    """
    require(config, {"quantization_status": "compressed", "kv_cache_scheme": None}, "quantization_config")
    schemes = {_scheme_of(group, config.get("format")) for group in config.get("config_groups", {}).values()}
    if len(schemes) != 1:
        raise UnsupportedQuantization(f"config_groups have {len(schemes)} schemes, one for all is read")
    return FORMAT_OF[schemes.pop()]


def _scheme_of(group: Mapping[str, Any], default_format: str | None) -> Scheme:
    name = group.get("format") or default_format
    if name not in _FORMATS:
        raise UnsupportedQuantization(f"the format {name!r} is not one of {', '.join(_FORMATS)}")
    scheme = _FORMATS[name]
    require(group.get("weights") or {}, _WEIGHTS[scheme] | {"dynamic": False}, f"weights of {name}")
    if (group.get("weights") or {}).get("actorder") in ("group", True):
        raise UnsupportedQuantization(f"weights of {name}: actorder 'group' is not read")
    # Rounding activations as well saves time elsewhere; here they stay as they are. A fixed range for
    # them would come with tensors of its own.
    for field in ("input_activations", "output_activations"):
        require(group.get(field) or {}, {"dynamic": True}, f"{field} of {name}")
    return scheme


def quantization_config(scheme: Scheme, ignored_modules: Sequence[str]) -> dict[str, Any]:
    """What config.json says of a checkpoint whose linear layers are quantised but for the ignored ones."""
    name = next(name for name, its_scheme in _FORMATS.items() if its_scheme == scheme)
    weights = _WEIGHTS[scheme] | {"dynamic": False, "actorder": None, "observer": "minmax"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": list(ignored_modules),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
