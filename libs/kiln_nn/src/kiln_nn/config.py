"""The shape of a dense Qwen3.5 text model, read from a checkpoint's config.json.

Both published forms are understood: the text model's own file, and the multimodal one that
nests it under `text_config`. Whatever the arithmetic here does not cover is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from kiln_nn.errors import (
    LASTING_FILE_ERRORS,
    CheckpointNotRead,
    InvalidModelConfig,
    ModelNotFound,
    UnsupportedModel,
)

LayerType = Literal["linear_attention", "full_attention"]

_MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
_SIZE_FIELDS = {  # our name -> config.json's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_FIXED_FIELDS = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one dense Qwen3.5 text model.

    `num_mtp_layers` is what config.json says; a loaded model carries what its weights hold.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_fraction: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    layer_types: tuple[LayerType, ...]
    num_mtp_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_layers:
            raise InvalidModelConfig(f"layer_types lists {len(self.layer_types)} of {self.num_layers} layers")
        if self.num_attention_heads % self.num_kv_heads:
            raise InvalidModelConfig(
                f"{self.num_attention_heads} attention heads cannot share {self.num_kv_heads} kv heads"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise InvalidModelConfig(
                f"{self.linear_num_value_heads} DeltaNet value heads cannot share"
                f" {self.linear_num_key_heads} key heads"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise InvalidModelConfig(f"the rotary part has {self.rotary_dim} of {self.head_dim} columns")

    @property
    def rotary_dim(self) -> int:
        """Leading columns of an attention head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def num_full_layers(self) -> int:
        """Layers with softmax attention and a KV cache."""
        return sum(kind == "full_attention" for kind in self.layer_types)

    @property
    def num_linear_layers(self) -> int:
        """DeltaNet layers, each with a recurrent state."""
        return self.num_layers - self.num_full_layers

    @property
    def key_dim(self) -> int:
        """Columns of all DeltaNet key heads together."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Columns of all DeltaNet value heads together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the DeltaNet convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json`, and the further stop ids of `generation_config.json`.

        Raises:
            ModelNotFound: the folder has no config.json.
            CheckpointNotRead: the file system failed.
            InvalidModelConfig, UnsupportedModel: as from_dict.
        """
        config = read_json(Path(folder) / "config.json")
        generation_path = Path(folder) / "generation_config.json"
        extra = read_json(generation_path).get("eos_token_id") if generation_path.is_file() else None
        return cls.from_dict(config, extra_eos_token_ids=_token_ids(extra, "eos_token_id"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], extra_eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
        """Read either form of config.json.

        Raises:
            InvalidModelConfig: a field is missing or has an impossible value.
            UnsupportedModel: another architecture, or a feature that is not computed here.
        """
        text = raw.get("text_config", raw)
        if not isinstance(text, Mapping):
            raise InvalidModelConfig("text_config is not an object")
        _check_supported(raw, text)
        sizes = {ours: _positive_int(text, theirs) for ours, theirs in _SIZE_FIELDS.items()}
        rope = _rope(text)
        eos = text.get("eos_token_id", raw.get("eos_token_id"))
        if eos is None:
            eos = raw.get("eos_token_id")
        return cls(
            **cast("dict[str, Any]", sizes),
            rms_norm_eps=_positive_float(text, "rms_norm_eps", 1e-6),
            rope_theta=_positive_float(rope, "rope_theta", None),
            rotary_fraction=_positive_float(rope, "partial_rotary_factor", 0.25),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
            layer_types=_layer_types(text, sizes["num_layers"]),
            num_mtp_layers=int(text.get("mtp_num_hidden_layers") or 0),
            eos_token_ids=tuple(dict.fromkeys(_token_ids(eos, "eos_token_id") + extra_eos_token_ids)),
        )

    def to_hf_dict(self) -> dict[str, Any]:
        """The text model's config.json: what transformers' Qwen3_5TextConfig reads."""
        eos = list(self.eos_token_ids)
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            **{theirs: getattr(self, ours) for ours, theirs in _SIZE_FIELDS.items()},
            **_FIXED_FIELDS,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_fraction,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "layer_types": list(self.layer_types),
            "mtp_num_hidden_layers": self.num_mtp_layers,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder.

    Raises:
        ModelNotFound, InvalidModelConfig: it is not there, or is none.
        CheckpointNotRead: the file system failed.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist") from error
    except (*LASTING_FILE_ERRORS, ValueError) as error:
        raise InvalidModelConfig(f"{path} is not readable JSON: {error}") from error
    except OSError as error:
        raise CheckpointNotRead(f"{path} could not be read: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidModelConfig(f"{path} is not a JSON object")
    return raw


def _check_supported(raw: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    model_type = text.get("model_type", raw.get("model_type"))
    if model_type not in _MODEL_TYPES:
        raise UnsupportedModel(f"model_type {model_type!r} is not one of {', '.join(_MODEL_TYPES)}")
    for field, value in _FIXED_FIELDS.items():
        if text.get(field, value) != value:
            raise UnsupportedModel(f"{field} is {text[field]!r}, only {value!r} is computed here")


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, from `rope_parameters` or the older flat fields."""
    rope: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if text.get(key) is not None:
            rope[key] = text[key]
    for nested in (text.get("rope_scaling"), text.get("rope_parameters")):
        if isinstance(nested, Mapping):
            rope.update({key: value for key, value in nested.items() if value is not None})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):  # on text, multi-axis positions are the plain ones
        raise UnsupportedModel(f"rope_type {kind!r} is not computed here, only the default one")
    return rope


def _layer_types(text: Mapping[str, Any], num_layers: int) -> tuple[LayerType, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = _positive_int(text, "full_attention_interval", default=4)
        kinds = [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(num_layers)
        ]
    if not isinstance(kinds, list | tuple):
        raise InvalidModelConfig("layer_types is not a list")
    unknown = sorted({str(kind) for kind in kinds} - {"linear_attention", "full_attention"})
    if unknown:
        raise UnsupportedModel(f"layer_types names {', '.join(unknown)}")
    return tuple(kinds)


def _positive_int(source: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = source.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidModelConfig(f"{field} is {value!r}, a positive whole number is needed")
    return value


def _positive_float(source: Mapping[str, Any], field: str, default: float | None) -> float:
    value = source.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InvalidModelConfig(f"{field} is {value!r}, a positive number is needed")
    return float(value)


def _token_ids(value: object, field: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids):
        raise InvalidModelConfig(f"{field} is {value!r}, token ids are needed")
    return tuple(cast("list[int]", ids))
