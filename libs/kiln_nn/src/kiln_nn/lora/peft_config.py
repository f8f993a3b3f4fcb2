"""`adapter_config.json` as PEFT writes it: what we write, and which of its features we refuse.

A field that is unknown here and switched on is refused by name: computing an adapter without
one of its features would answer wrongly without saying so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from kiln_nn.errors import InvalidAdapter, UnsupportedAdapter
from kiln_nn.lora.spec import LoraSpec

# Read below, or without effect on what a trained adapter computes.
_HARMLESS_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_OFF_VALUES: tuple[Any, ...] = (None, False, "none", "", {}, [])
# These only choose the starting values of A and B; others (pissa, olora, ...) also change the
# base weights, so that their adapter means nothing beside the untouched base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """The fields that matter of a plain LoRA adapter_config.json.

    `target_modules`: the listed module names, or None where they are a pattern.
    `covers_all_layers`: whether every matching module must have tensors.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None
    covers_all_layers: bool
    base_model_name: str


def config_json(spec: LoraSpec, target_modules: list[str], base_model_name: str) -> str:
    """The adapter_config.json of an adapter, the same text for the same adapter."""
    fields = {
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def parse_config(text: str | bytes) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        InvalidAdapter: not JSON, or a field has an impossible value.
        UnsupportedAdapter: a PEFT feature beyond plain LoRA is switched on.
    """
    try:
        raw: Any = json.loads(text)
    except ValueError as error:
        raise InvalidAdapter(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidAdapter("adapter_config.json is not a JSON object")
    _refuse_features(raw)
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise InvalidAdapter(f"r is {rank!r}, a positive whole number is needed")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise InvalidAdapter(f"lora_alpha is {alpha!r}, a positive number is needed")
    targets = _target_modules(raw)
    is_partial = any(raw.get(field) for field in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    return PeftConfig(
        rank=rank,
        alpha=float(alpha),
        target_modules=targets,
        covers_all_layers=targets is not None and not is_partial,
        base_model_name=str(raw.get("base_model_name_or_path") or ""),
    )


def _target_modules(raw: dict[str, Any]) -> tuple[str, ...] | None:
    targets: Any = raw.get("target_modules")
    if isinstance(targets, str):
        return None
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InvalidAdapter(f"target_modules is {targets!r}, a list of names is needed")
    return tuple(targets)


def _refuse_features(raw: dict[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"peft_type is {raw.get('peft_type')!r}, only LORA is supported")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedAdapter(f"task_type is {raw['task_type']!r}, only CAUSAL_LM is supported")
    for field, value in raw.items():
        if field not in _HARMLESS_FIELDS and value not in _OFF_VALUES:
            raise UnsupportedAdapter(f"{field} is {value!r}, which is not supported")
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base weights"
        )
