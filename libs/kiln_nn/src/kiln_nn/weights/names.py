"""Canonical tensor names of a dense Qwen3.5 text model, with the shape each must have.

Canonical are the text checkpoint's own names (`model.layers.0...`); the multimodal
checkpoints' `model.language_model.` is mapped onto them and their vision tower is recognised
so that it can be left out knowingly. The multi-token-prediction layer lives under `mtp.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kiln_nn.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MTP_PREFIX = "mtp."

_NESTED_PREFIX = "model.language_model."
_VISION_PREFIXES = ("model.visual.", "visual.")
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_FP32_SUFFIXES = ("norm.weight", ".A_log", ".dt_bias")

# Linear layers that read the same input: their rows are laid out back to back, so that one
# matrix product can cover them all.
FUSED_GROUPS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_attn.in_proj": (
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_a",
    ),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# What may be quantised: the large matrices of the decoder. in_proj_b and in_proj_a are small and steer
# how states decay; the multi-token-prediction layer is small and may be trained itself.
_QUANTISABLE = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)"
    r"|mlp\.(gate|up|down)_proj)\.weight"
)
_FUSED_OF = {part: fused for fused, parts in FUSED_GROUPS.items() for part in parts}


@dataclass(frozen=True)
class TensorSpec:
    """What one checkpoint tensor must look like.

    `keeps_fp32`: stored in float32 it stays so whatever type the model is loaded in (decays and
    norms are a few kilobytes and set the precision of everything after them).
    `fused_name`: the fused tensor of which this one is a row slice, if any.
    """

    shape: tuple[int, ...]
    keeps_fp32: bool = False
    fused_name: str | None = None


def canonical_name(stored_name: str) -> str | None:
    """The canonical name of a tensor as stored in a checkpoint; None for the vision tower's."""
    if stored_name.startswith(_VISION_PREFIXES):
        return None
    if stored_name.startswith(_NESTED_PREFIX):
        return "model." + stored_name.removeprefix(_NESTED_PREFIX)
    return stored_name


def is_quantisable(name: str) -> bool:
    """Whether the tensor of this canonical name may lie in the arena quantised."""
    return _QUANTISABLE.fullmatch(name) is not None


def count_mtp_layers(names: Iterable[str]) -> int:
    """Multi-token-prediction layers among canonical names: 0 if there are no `mtp.` tensors."""
    indices = {int(match[1]) for name in names if (match := _MTP_LAYER.match(name))}
    return max(indices, default=-1) + 1


def expected_tensors(config: ModelConfig, include_mtp: bool) -> dict[str, TensorSpec]:
    """Every tensor the checkpoint must hold, in the order in which the arena lays them out.

    A tied head is not among them: it is an alias of the embedding.
    `include_mtp`: also those of `config.num_mtp_layers` multi-token-prediction layers.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for index, kind in enumerate(config.layer_types):
        shapes |= _layer_shapes(config, f"model.layers.{index}.", kind == "linear_attention")
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    if include_mtp and config.num_mtp_layers:
        shapes |= _mtp_shapes(config)
    return {name: _spec(name, shape) for name, shape in shapes.items()}


def _spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
    keeps_fp32 = name.endswith(_FP32_SUFFIXES) or ".pre_fc_norm_" in name
    layer, _, part = name.removesuffix(".weight").partition(".layers.")
    number, _, part = part.partition(".")
    fused = _FUSED_OF.get(part)
    return TensorSpec(shape, keeps_fp32, f"{layer}.layers.{number}.{fused}.weight" if fused else None)


def _layer_shapes(config: ModelConfig, prefix: str, is_linear: bool) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    mixer = _linear_attention_shapes(config) if is_linear else _full_attention_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        **mixer,
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def _linear_attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, num_value_heads = config.hidden_size, config.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkv.weight": (config.conv_dim, hidden),
        "linear_attn.in_proj_z.weight": (config.value_dim, hidden),
        "linear_attn.in_proj_b.weight": (num_value_heads, hidden),
        "linear_attn.in_proj_a.weight": (num_value_heads, hidden),
        "linear_attn.conv1d.weight": (config.conv_dim, 1, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (num_value_heads,),
        "linear_attn.dt_bias": (num_value_heads,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, config.value_dim),
    }


def _full_attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, config.head_dim
    return {
        # Rows are per head [query | gate], hence twice the query's width.
        "self_attn.q_proj.weight": (2 * config.num_attention_heads * width, hidden),
        "self_attn.k_proj.weight": (config.num_kv_heads * width, hidden),
        "self_attn.v_proj.weight": (config.num_kv_heads * width, hidden),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
        "self_attn.o_proj.weight": (hidden, config.num_attention_heads * width),
    }


def _mtp_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The layer reads fc([embedding | hidden]), each half through its own norm; its mixer is attention."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.norm.weight": (hidden,),
    }
    for index in range(config.num_mtp_layers):
        shapes |= _layer_shapes(config, f"mtp.layers.{index}.", is_linear=False)
    return shapes
