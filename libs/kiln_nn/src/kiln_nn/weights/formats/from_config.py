"""Which format a checkpoint's config.json says it is quantised in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kiln_nn.errors import UnsupportedQuantization
from kiln_nn.weights.formats import awq, compressed_tensors, gptq
from kiln_nn.weights.formats.stored_matrix import StoredFormat

_READERS = {
    "compressed-tensors": compressed_tensors.from_config,
    "gptq": gptq.from_config,
    "awq": awq.from_config,
}


def stored_format(raw_config: Mapping[str, Any]) -> StoredFormat | None:
    """The format that a config.json names; None where it names none.

    Raises:
        UnsupportedQuantization: a method or a variant that is not read here.
    """
    text = raw_config.get("text_config") or {}
    quantization = raw_config.get("quantization_config") or text.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method not in _READERS:
        raise UnsupportedQuantization(f"quant_method {method!r} is not one of {', '.join(_READERS)}")
    return _READERS[method](quantization)
