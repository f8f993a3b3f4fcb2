"""Checks a PEFT adapter against its base model before anything of it becomes visible. No torch."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from kiln_common.errors import AdapterMismatch
from kiln_registry.domain import (
    BaseModelRecord,
    IncompleteAdapter,
    InspectedAdapter,
    InvalidAdapterConfig,
    ModuleShape,
    NotFinite,
    PeftConfig,
    RankMismatch,
    UnexpectedTensor,
    UnsupportedAdapterFeature,
)
from kiln_registry.safetensors_header import TensorEntry, find_non_finite, read_entries

MAX_RANK = 256
_MAX_CONFIG_CHARS = 1_000_000
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

# PEFT settings that change what an adapter computes and that the engine does not do. Each is
# refused unless it has one of the values under which it changes nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "use_bdlora": (False,),
    "monteclora_config": (),
}


def parse_peft_config(config_json: str) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        InvalidAdapterConfig: not JSON, or rank, alpha or targets are missing or out of range.
        UnsupportedAdapterFeature: it uses something other than plain LoRA; the message names it.
    """
    config = _load_config(config_json)
    peft_type = config.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedAdapterFeature(f"the adapter is of type {str(peft_type)[:40]!r}, not LORA")
    for feature, neutral in _NEUTRAL_VALUES.items():
        value = config.get(feature)
        if value is not None and value not in neutral:
            raise UnsupportedAdapterFeature(f"the adapter uses {feature}={json.dumps(value)[:120]}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise InvalidAdapterConfig(f"r is {json.dumps(rank)[:40]}, it must be 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise InvalidAdapterConfig(f"lora_alpha is {json.dumps(alpha)[:40]}, it must be a positive number")
    return PeftConfig(rank, float(alpha), _target_modules(config.get("target_modules")))


def inspect_adapter(path: Path, config: PeftConfig, base_model: BaseModelRecord) -> InspectedAdapter:
    """Check the safetensors file at `path`: names, rank, shapes, dtypes, finite numbers.

    Raises:
        AdapterMismatch: a module or a shape is not the base model's.
        PickleRefused, InvalidSafetensors, UnsupportedDtype, UnexpectedTensor, IncompleteAdapter,
        RankMismatch, NotFinite: as they say.
    """
    entries = read_entries(path)
    sides = _pair_up(entries)
    for module_path, matrices in sides.items():
        shape = base_model.modules.get(module_path)
        if shape is None:
            raise AdapterMismatch(
                f"the adapter changes {module_path[:200]!r}, which {base_model.model_id} does not have"
            )
        _check_targeted(module_path, config)
        _check_shapes(module_path, matrices, shape, config.rank)
    bad_tensor = find_non_finite(path, entries)
    if bad_tensor is not None:
        raise NotFinite(f"the tensor {bad_tensor!r} holds a NaN or an infinity")
    targets = sorted({module_path.rpartition(".")[2] for module_path in sides})
    return InspectedAdapter(config.rank, config.alpha, tuple(targets))


def _load_config(config_json: str) -> dict[str, Any]:
    if len(config_json) > _MAX_CONFIG_CHARS:
        raise InvalidAdapterConfig(f"adapter_config.json has {len(config_json)} characters")
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterConfig(f"adapter_config.json is not JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise InvalidAdapterConfig("adapter_config.json is not a JSON object")
    return config


def _target_modules(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    if isinstance(value, list) and value and all(isinstance(part, str) and part for part in value):
        return tuple(value)
    raise InvalidAdapterConfig("target_modules must be a list of module names, or a pattern")


def _pair_up(entries: list[TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """{module path: {"A": entry, "B": entry}}, complete for every module."""
    sides: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for entry in entries:
        match = _TENSOR_NAME.fullmatch(entry.name)
        if match is None:
            raise UnexpectedTensor(f"the tensor {entry.name[:200]!r} is not part of a LoRA adapter")
        sides[match["path"]][match["side"]] = entry
    if not sides:
        raise IncompleteAdapter("the file holds no tensors")
    for module_path, matrices in sides.items():
        if len(matrices) != 2:
            missing = "B" if "A" in matrices else "A"
            raise IncompleteAdapter(f"the module {module_path[:200]!r} has no lora_{missing}.weight")
    return dict(sides)


def _check_targeted(module_path: str, config: PeftConfig) -> None:
    """PEFT would silently leave out a tensor whose module the config does not name."""
    if config.target_modules is None:
        return
    if not any(module_path == name or module_path.endswith(f".{name}") for name in config.target_modules):
        raise InvalidAdapterConfig(
            f"the file adapts {module_path!r}, which target_modules in adapter_config.json leaves out"
        )


def _check_shapes(module_path: str, matrices: dict[str, TensorEntry], shape: ModuleShape, rank: int) -> None:
    expected = {"A": (rank, shape.in_features), "B": (shape.out_features, rank)}
    rank_axis = {"A": 0, "B": 1}
    for side, entry in matrices.items():
        if entry.shape == expected[side]:
            continue
        if len(entry.shape) == 2 and entry.shape[rank_axis[side]] != rank:
            raise RankMismatch(
                f"{module_path}.lora_{side}.weight has shape {[*entry.shape]}, the config's rank is {rank}"
            )
        raise AdapterMismatch(
            f"{module_path}.lora_{side}.weight has shape {[*entry.shape]}, "
            f"the base model needs {[*expected[side]]}"
        )
