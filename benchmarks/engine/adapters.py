"""Random adapters in PEFT's format."""

from __future__ import annotations

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, lora_shapes, serialize_adapter


def random_adapter_files(config: ModelConfig, count: int, rank: int) -> list[tuple[bytes, str]]:
    """(safetensors, adapter_config.json) of adapters on all linear layers, of small effect."""
    spec = LoraSpec(rank=rank, alpha=2.0 * rank)
    files = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            path: (
                (torch.randn(rank, inputs, generator=generator) * inputs**-0.5).bfloat16(),
                (torch.randn(outputs, rank, generator=generator) * 0.02).bfloat16(),
            )
            for path, (inputs, outputs) in lora_shapes(config, spec).items()
        }
        config_json, adapter_bytes = serialize_adapter(tensors, spec, "random")
        files.append((adapter_bytes, config_json))
    return files
