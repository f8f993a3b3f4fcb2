"""The same tests on a quantised engine: `pytest --quantization int4 tests/parity` (see tests/conftest.py).

Engines read the choice as the setting it is. Tiny checkpoints are then drawn on the scheme's own numbers,
so that quantising them loses nothing and every oracle, which reads the same files, still holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from kiln_nn.kernels.quantised import GROUP_INPUTS, QuantisedMatrix, quantise_rtn
from kiln_nn.weights.names import is_quantisable

SETTING = "KILN_ENGINE_QUANTIZATION"


def quantization() -> Any:
    """What engines under test round their weights to: "none", "fp8" or "int4"."""
    return os.environ.get(SETTING, "none")


def as_engine_holds_them(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Weights for an engine that is built without loading a checkpoint."""
    return {name: _quantised(name, weight) for name, weight in weights.items()}


def on_the_schemes_numbers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that quantising does not change."""
    return {
        name: held.dequantise(torch.float32) if isinstance(held, QuantisedMatrix) else held
        for name, held in as_engine_holds_them(weights).items()
    }


def _quantised(name: str, weight: torch.Tensor) -> torch.Tensor | QuantisedMatrix:
    scheme = quantization()
    fits = is_quantisable(name) and (scheme == "fp8" or weight.shape[1] % GROUP_INPUTS == 0)
    return quantise_rtn(weight, scheme) if fits and scheme != "none" else weight
