"""Random tiny Qwen3.5 checkpoints in Hugging Face form, and transformers' model of one as the oracle.

The usual initialisation forgets within a token and so hides every state bug: here `A_log` is
drawn so that the memory half-lives of a layer's heads spread log-uniformly over 1 to 4,096 tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kiln_nn.config import ModelConfig
from kiln_nn.lora import AdapterTensors, LoraSpec, lora_shapes
from kiln_nn.weights.names import TensorSpec, expected_tensors
from tests.support.variants import on_the_schemes_numbers, quantization

MAX_HALF_LIFE_TOKENS = 4096
_DT_BIAS = 1.0

# Overrides of make_checkpoint: tied and untied, grouped heads, both published DeltaNet head
# counts (16/32 and 16/16), several interval patterns.
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "layer_types": ("linear_attention", "full_attention") * 2},
    "deltanet_16_32": {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 8,
        "layer_types": ("linear_attention", "linear_attention", "full_attention"),
    },
    "deltanet_16_16": {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "num_kv_heads": 1,
        "tie_word_embeddings": False,
        "layer_types": ("full_attention", "linear_attention", "linear_attention", "full_attention"),
    },
    "linear_only_start": {
        "num_attention_heads": 6,
        "num_kv_heads": 3,
        "rotary_fraction": 0.5,
        "layer_types": ("linear_attention",) * 3 + ("full_attention",) * 2,
    },
}

# Every linear layer reads whole groups of 128 inputs, so that all of them can be quantised to four bits.
WHOLE_GROUPS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


def tiny_config(**overrides: Any) -> ModelConfig:
    """A four-layer model of about 60 thousand parameters; any ModelConfig field can be overridden.

    `num_layers` follows `layer_types` if only that is given.
    """
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rotary_fraction": 0.25,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "layer_types": ("linear_attention",) * 3 + ("full_attention",),
        "num_mtp_layers": 1,
        "eos_token_ids": (299,),
        **(WHOLE_GROUPS if quantization() == "int4" else {}),
        **overrides,
    }
    fields.setdefault("num_layers", len(fields["layer_types"]))
    return ModelConfig(**fields)


def make_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    nested: bool = False,
    with_vision: bool = False,
    num_shards: int = 1,
    **overrides: Any,
) -> ModelConfig:
    """Write config.json and safetensors of a random model into `folder`; returns its config.

    `dtype`: of all tensors but the decays and norms, which stay float32.
    `nested`: the multimodal form, with `text_config` and the prefix `model.language_model.`.
    `with_vision`: adds a few tensors of a vision tower (and implies nothing about the config).
    `num_shards`: more than one writes an index beside the shards.
    """
    config = tiny_config(**overrides)
    tensors = random_tensors(config, seed)
    stored = {}
    for name, tensor in tensors.items():
        keeps_fp32 = expected_tensors(config, include_mtp=True)[name].keeps_fp32
        stored_name = name.replace("model.", "model.language_model.", 1) if nested else name
        stored[stored_name] = tensor if keeps_fp32 else tensor.to(dtype)
    if with_vision:
        stored["model.visual.patch_embed.proj.weight"] = torch.ones(4, 3, 2, dtype=dtype)
        stored["model.visual.merger.norm.bias"] = torch.zeros(4, dtype=dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config_json(config, nested), indent=2))
    write_safetensors(folder, stored, num_shards)
    return config


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 values for every checkpoint tensor, scaled so that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    specs = expected_tensors(config, include_mtp=True)
    return on_the_schemes_numbers({name: _draw(name, spec, generator) for name, spec in specs.items()})


def random_adapter(config: ModelConfig, spec: LoraSpec, seed: int = 0) -> AdapterTensors:
    """A and B with random values (B too, unlike a fresh adapter's), large enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(spec.rank, in_features, generator=generator) / math.sqrt(in_features),
            torch.randn(out_features, spec.rank, generator=generator) * 0.2 / spec.scaling,
        )
        for path, (in_features, out_features) in lora_shapes(config, spec).items()
    }


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """One `model.safetensors`, or shards with their index, names dealt round-robin."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        weight_map.update(dict.fromkeys(part, file_name))
        save_file(part, folder / file_name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files under their canonical names, vision left out."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not name.startswith("model.visual."):
                tensors[name.replace("model.language_model.", "model.", 1)] = tensor
    return tensors


def hf_model(folder: str | Path) -> Any:
    """transformers' Qwen3_5ForCausalLM with the folder's weights, float32, in eval mode.

    Loaded strictly and without Kiln's loader; the multi-token-prediction tensors, which
    transformers has no module for, are left out.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    raw = json.loads((Path(folder) / "config.json").read_text())
    config = Qwen3_5TextConfig(**raw.get("text_config", raw))
    config._attn_implementation = "eager"
    model = Qwen3_5ForCausalLM(config).float()
    state = {name: t.float() for name, t in read_tensors(folder).items() if not name.startswith("mtp.")}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _config_json(config: ModelConfig, nested: bool) -> dict[str, Any]:
    text = config.to_hf_dict()
    if not nested:
        return text
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": {"model_type": "qwen3_5_vision", "depth": 1},
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _draw(name: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    shape = spec.shape
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".A_log"):
        return _decays_with_log_uniform_half_lives(shape[0], generator)
    if name.endswith(".dt_bias"):
        return torch.full(shape, _DT_BIAS)
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * noise
    if spec.keeps_fp32:  # the other norms multiply by 1 + w
        return 0.1 * noise
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return noise * 2 / math.sqrt(shape[1])  # logits of standard deviation 2
    gain = (
        0.5
        if name.endswith(("in_proj_a.weight", "o_proj.weight", "out_proj.weight", "down_proj.weight"))
        else 1
    )
    return noise * gain / math.sqrt(shape[1])


def _decays_with_log_uniform_half_lives(num_heads: int, generator: torch.Generator) -> torch.Tensor:
    """A_log [num_heads]: one half-life from each of num_heads equal slices of log2 1..4096, shuffled.

    The decay of a token is exp(-exp(A_log) * softplus(a + dt_bias)), with `a` near 0.
    """
    slices = (torch.arange(num_heads) + torch.rand(num_heads, generator=generator)) / num_heads
    half_lives = 2 ** (
        slices[torch.randperm(num_heads, generator=generator)] * math.log2(MAX_HALF_LIFE_TOKENS)
    )
    rate = math.log(2) / half_lives
    return torch.log(rate / math.log1p(math.exp(_DT_BIAS)))
