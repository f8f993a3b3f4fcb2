"""Checks a PEFT adapter against its base model before anything of it becomes visible. No torch."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kiln_common.errors import AdapterMismatch
from kiln_registry.domain import (
    AdapterRankTooHigh,
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
    is_draft,
)
from kiln_registry.safetensors_header import TensorEntry, find_non_finite, read_entries

MAX_RANK = 256
_MAX_CONFIG_CHARS = 1_000_000
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

# Fields of adapter_config.json that are read below, or do not change what a trained adapter
# computes. Any other field that is switched on is refused by its name: engines refuse it too
# (kiln_nn.lora.peft_config), and an alias must never point at what they cannot load.
_KNOWN_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
        "runtime_config", "target_modules", "task_type",
    }
)  # fmt: skip
# What to do instead, of those that people meet.
_FEATURE_HINTS = {
    "use_dora": "Train it again with use_dora=False: magnitudes beside A and B are not served.",
    "modules_to_save": "Train it again without modules_to_save: whole layers are not part of an adapter here.",
    "bias": 'Train it again with bias="none".',
    "lora_bias": "Train it again with lora_bias=False.",
    "trainable_token_indices": "Train it again without trainable_token_indices: embeddings are not adapted.",
    "target_parameters": "Name linear layers in target_modules instead.",
    "alora_invocation_tokens": "Train it again as plain LoRA: activated LoRA is not served.",
    "init_lora_weights": "Let PEFT turn it into plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
    "peft_type": "Only LoRA is served; PEFT's other methods are not.",
}
_OFF_VALUES: tuple[Any, ...] = (None, False, "none", "", {}, [])
# The other initialisations (pissa, olora, ...) also change the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PARTIAL_FIELDS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def load_config(config_json: str) -> dict[str, Any]:
    """Raises InvalidAdapterConfig unless it is a JSON object."""
    if len(config_json) > _MAX_CONFIG_CHARS:
        raise InvalidAdapterConfig(f"adapter_config.json has {len(config_json)} characters")
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterConfig(f"adapter_config.json is not JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise InvalidAdapterConfig("adapter_config.json is not a JSON object")
    return config


def parse_peft_config(config_json: str) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        InvalidAdapterConfig: not JSON, or rank, alpha or targets are missing or out of range.
        UnsupportedAdapterFeature: it uses something other than plain LoRA; the message names it.
    """
    config = load_config(config_json)
    _refuse_features(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise InvalidAdapterConfig(f"r is {_shown(rank)}, it must be 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise InvalidAdapterConfig(f"lora_alpha is {_shown(alpha)}, it must be a positive number")
    targets = _target_modules(config.get("target_modules"))
    is_partial = any(config.get(field) for field in _PARTIAL_FIELDS)
    return PeftConfig(rank, float(alpha), targets, targets is not None and not is_partial)


def inspect_adapter(path: Path, config: PeftConfig, base_model: BaseModelRecord) -> InspectedAdapter:
    """Check the safetensors file at `path`: names, rank, shapes, dtypes, finite numbers.

    Raises:
        AdapterMismatch: a module or a shape is not the base model's.
        AdapterRankTooHigh: no engine of the base model could load it.
        PickleRefused, InvalidSafetensors, UnsupportedDtype, UnexpectedTensor, IncompleteAdapter,
        RankMismatch, NotFinite: as they say.
    """
    if 0 < base_model.max_adapter_rank < config.rank:
        raise AdapterRankTooHigh(config.rank, base_model.max_adapter_rank)
    entries = read_entries(path)
    sides = pair_up(entries)
    for module_path, matrices in sides.items():
        shape = base_model.modules.get(module_path)
        if shape is None:
            raise AdapterMismatch(
                f"the adapter changes {module_path[:200]!r}, which {base_model.model_id} does not have"
            )
        _check_targeted(module_path, config)
        _check_shapes(module_path, matrices, shape, config.rank)
    _check_complete(config, sides, base_model)
    bad_tensor = find_non_finite(path, entries)
    if bad_tensor is not None:
        raise NotFinite(f"the tensor {bad_tensor!r} holds a NaN or an infinity")
    targets = sorted({path.rpartition(".")[2] for path in sides if not is_draft(path)})
    if any(map(is_draft, sides)):
        targets.append("mtp")
    return InspectedAdapter(config.rank, config.alpha, tuple(targets))


def _refuse_features(config: dict[str, Any]) -> None:
    expected = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "init_lora_weights": _PLAIN_INITS}
    for field, supported in expected.items():
        if config.get(field) not in supported:
            raise _unsupported(field, config.get(field))
    for field, value in config.items():
        if field not in _KNOWN_FIELDS and value not in _OFF_VALUES:
            raise _unsupported(field, value)


def _unsupported(field: str, value: Any) -> UnsupportedAdapterFeature:
    message = f"the adapter has {field[:80]}={_shown(value)}"
    return UnsupportedAdapterFeature(message, hint=_FEATURE_HINTS.get(field))


def _shown(value: Any) -> str:
    return json.dumps(value)[:120]


def _target_modules(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    if isinstance(value, list) and value and all(isinstance(part, str) and part for part in value):
        return tuple(value)
    raise InvalidAdapterConfig("target_modules must be a list of module names, or a pattern")


def pair_up(entries: list[TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """{module path: {"A": entry, "B": entry}}, complete for every module.

    Raises:
        UnexpectedTensor, IncompleteAdapter
    """
    sides: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for entry in entries:
        match = _TENSOR_NAME.fullmatch(entry.name)
        if match is None:
            raise UnexpectedTensor(f"the tensor {entry.name[:200]!r} is not part of a LoRA adapter")
        # Adapters made on the multimodal checkpoint say language_model in their paths.
        module_path = match["path"].replace("model.language_model.", "model.", 1)
        if match["side"] in sides[module_path]:
            raise UnexpectedTensor(f"the tensor {entry.name[:200]!r} is there under two names")
        sides[module_path][match["side"]] = entry
    if not sides:
        raise IncompleteAdapter("the file holds no tensors")
    for module_path, matrices in sides.items():
        if len(matrices) != 2:
            missing = "B" if "A" in matrices else "A"
            raise IncompleteAdapter(f"the module {module_path[:200]!r} has no lora_{missing}.weight")
    return dict(sides)


def _check_targeted(module_path: str, config: PeftConfig) -> None:
    """PEFT would silently leave out a tensor whose module the config does not name."""
    if config.target_modules is not None and not _is_targeted(module_path, config.target_modules):
        raise InvalidAdapterConfig(
            f"the file adapts {module_path!r}, which target_modules in adapter_config.json leaves out"
        )


def _check_complete(config: PeftConfig, sides: Mapping[str, object], base_model: BaseModelRecord) -> None:
    if all(map(is_draft, sides)):
        raise IncompleteAdapter("the file has no tensors for the main model")
    drafts = [path for path in base_model.modules if is_draft(path)]
    missing = [path for path in drafts if path not in sides]
    if len(missing) not in (0, len(drafts)):
        raise IncompleteAdapter(
            f"the file adapts {len(drafts) - len(missing)} of {len(drafts)} layers that predict further "
            f"tokens, and not {missing[0]!r}"
        )
    if not config.covers_all_layers or config.target_modules is None:
        return
    for module_path in base_model.modules:
        if is_draft(module_path):
            continue  # as PEFT, which does not know these layers
        if module_path not in sides and _is_targeted(module_path, config.target_modules):
            raise IncompleteAdapter(
                f"target_modules in adapter_config.json covers {module_path!r}, the file has no tensors for it"
            )


def _is_targeted(module_path: str, target_modules: tuple[str, ...]) -> bool:
    return any(f".{module_path}".endswith(f".{name}") for name in target_modules)


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
