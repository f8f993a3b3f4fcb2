"""Brings PEFT adapters into the one form that engines and trainers load: one rank, one scaling.

An adapter with rsLoRA or with ranks and alphas by layer computes the same as a plain one: rsLoRA is
another alpha, a lower rank is filled up with zeros, and a layer's own scaling goes into its B.

Paper: Kalajdzievski 2023, A Rank Stabilization Scaling Factor (arXiv 2312.03732).
Legend: `r` rank, `I` inputs and `O` outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kiln_registry.adapter_file import AdapterFile
from kiln_registry.domain import InvalidAdapterConfig, RankMismatch, UnsupportedAdapterFeature
from kiln_registry.inspection import MAX_RANK, load_config

_PATTERN_FIELDS = ("use_rslora", "rank_pattern", "alpha_pattern")
# What a pattern may be made of: PEFT takes any regular expression, and one from a stranger can take
# for ever to match.
_PLAIN_PATTERN = re.compile(r"\^?(\w|\\?\.)+")
_PATTERN_HINT = "Write names of layers, such as q_proj or layers.3.mlp.up_proj, instead of an expression."


@dataclass(frozen=True, slots=True)
class LoraScalings:
    """Rank and scaling of each layer, as adapter_config.json gives them."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_by_pattern: Mapping[str, int]
    alpha_by_pattern: Mapping[str, float]

    def rank_of(self, path: str) -> int:
        return _first_match(self.rank_by_pattern, path) or self.rank

    def scaling_of(self, path: str) -> float:
        """Factor on B @ A of the layer."""
        return self._scaling(_first_match(self.alpha_by_pattern, path) or self.alpha, self.rank_of(path))

    @property
    def common_scaling(self) -> float:
        """That of the layers no pattern matches."""
        return self._scaling(self.alpha, self.rank)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


@dataclass(frozen=True, slots=True)
class PlainForm:
    """The config in plain form, and the matrices where they are not the file's any more."""

    config_json: str
    tensors: dict[str, npt.NDArray[np.float32]] | None = None


def plain_config(config_json: str) -> str:
    """The config without what `to_plain_form` takes out of it, to be checked before the bytes arrive.

    Raises:
        InvalidAdapterConfig, UnsupportedAdapterFeature
    """
    config = load_config(config_json)
    _read_scalings(config)
    return _without_patterns(config)


def to_plain_form(config_json: str, path: Path) -> PlainForm:
    """The adapter at `path` with one rank and one scaling; as it is where it has them already.

    Raises:
        InvalidAdapterConfig, UnsupportedAdapterFeature, RankMismatch, or what is wrong with the file.
    """
    config = load_config(config_json)
    scalings = _read_scalings(config)
    if scalings is None:
        return PlainForm(config_json)
    if not scalings.rank_by_pattern and not scalings.alpha_by_pattern:
        return PlainForm(_without_patterns(config, scalings.rank, scalings.common_scaling))
    file = AdapterFile(path, 1.0)
    ranks = {module: scalings.rank_of(file.path_in_file(module)) for module in file.module_paths}
    rank = max(ranks.values())
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for module, module_rank in ranks.items():
        name = file.path_in_file(module)
        factor = scalings.scaling_of(name) / scalings.common_scaling
        a_rI, b_Or = _read(file, module, module_rank)
        missing = rank - module_rank
        for side, matrix in (
            ("A", np.pad(a_rI, ((0, missing), (0, 0)))),
            ("B", np.pad(factor * b_Or, ((0, 0), (0, missing)))),
        ):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = matrix.astype(np.float32)
    return PlainForm(_without_patterns(config, rank, scalings.common_scaling), tensors)


def _read(file: AdapterFile, module: str, rank: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    update = file.read(module)
    assert update is not None
    shapes = update.a_rI.shape, update.b_Or.shape
    if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != (rank, rank):
        raise RankMismatch(
            f"{module} has A {[*shapes[0]]} and B {[*shapes[1]]}, the config's rank for it is {rank}"
        )
    return update.a_rI, update.b_Or


def _read_scalings(config: Mapping[str, Any]) -> LoraScalings | None:
    """None where the config is plain as it is."""
    if not any(config.get(field) for field in _PATTERN_FIELDS):
        return None
    rank, alpha, is_stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(is_stabilised, bool):
        raise InvalidAdapterConfig("use_rslora must be true or false")
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict):
            raise InvalidAdapterConfig(f"{field} must be an object of layers and numbers")
        for pattern in patterns:
            if not _PLAIN_PATTERN.fullmatch(pattern):
                message = f"the adapter uses {field} with the expression {pattern[:80]!r}"
                raise UnsupportedAdapterFeature(message, hint=_PATTERN_HINT)
    for field, value in (("r", rank), *(("rank_pattern", value) for value in ranks.values())):
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise InvalidAdapterConfig(f"{field} has the rank {str(value)[:40]}, it must be 1 to {MAX_RANK}")
    for field, value in (("lora_alpha", alpha), *(("alpha_pattern", value) for value in alphas.values())):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InvalidAdapterConfig(f"{field} has {str(value)[:40]}, it must be a positive number")
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return LoraScalings(rank, float(alpha), is_stabilised, ranks, alphas)


def _without_patterns(config: Mapping[str, Any], rank: int = 0, scaling: float = 0.0) -> str:
    plain = {field: value for field, value in config.items() if field not in _PATTERN_FIELDS}
    if rank:
        plain |= {"r": rank, "lora_alpha": scaling * rank}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _first_match(values: Mapping[str, Any], path: str) -> Any:
    """As PEFT looks them up: the first pattern that the path ends with, from a dot on."""
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return None
