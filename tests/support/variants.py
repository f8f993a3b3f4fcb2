"""The same tests on a quantised engine, and on one that guesses ahead (see tests/conftest.py).

Engines read either choice as the setting it is. With `--quantization` tiny checkpoints are drawn on the
scheme's own numbers, so that quantising them loses nothing and every oracle, which reads the same files,
still holds. With `--speculation` answers are those without, so that nothing else changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kiln_engine.speculation.speculator import DraftSpeculator
from kiln_nn.kernels.quantised import GROUP_INPUTS, QuantisedMatrix, quantise_rtn
from kiln_nn.weights.names import is_quantisable

SETTING = "KILN_ENGINE_QUANTIZATION"
SPECULATION_SETTING = "KILN_ENGINE_SPECULATION"
_MAX_DRAFT_TOKENS = 3


def quantization() -> Any:
    """What engines under test round their weights to: "none", "fp8" or "int4"."""
    return os.environ.get(SETTING, "none")


def speculation() -> Any:
    """What engines under test guess by: "none", "ngram" or "mtp"."""
    return os.environ.get(SPECULATION_SETTING, "none")


def patience() -> int:
    """What bounds on time are multiplied by: a CPU makes rounded weights whole again for each product."""
    return 1 if quantization() == "none" else 4


def draft_memory() -> dict[str, Any]:
    """What drafts ask of memory, for a runner that is built without settings: fields of MemoryRequest."""
    if speculation() == "none":
        return {}
    return {"max_draft_tokens": _MAX_DRAFT_TOKENS, "drafts_by_mtp": speculation() == "mtp"}


def speculator(row_sizes: Sequence[int]) -> DraftSpeculator | None:
    """Who guesses for a scheduler that is built without settings: always as far as it may."""
    if speculation() == "none":
        return None
    return DraftSpeculator(
        _MAX_DRAFT_TOKENS, row_sizes, drafts_on_device=speculation() == "mtp", is_adaptive=False
    )


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
