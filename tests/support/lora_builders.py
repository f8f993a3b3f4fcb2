"""Adapters with something in them: both A and B random, so that every gradient is non-zero."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

from kiln_nn.config import ModelConfig
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.lora.spec import LoraSpec


def random_lora(
    config: ModelConfig, *, rank: int = 3, seed: int = 5, dtype: torch.dtype = torch.float32, **fields: Any
) -> LoraParameters:
    """An adapter on all linear layers whose update is of the size of a tenth of the layer's output."""
    lora = LoraParameters.create(config, LoraSpec(rank, alpha=2.0 * rank, **fields), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {
        path: (a.to(dtype), (0.1 * torch.randn(b.shape, generator=generator)).to(dtype))
        for path, (a, b) in lora.tensors().items()
    }
    return LoraParameters(lora.spec, tensors)


def safetensors_of(tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    """An adapter's file, whatever is in it."""
    return save(
        {
            f"base_model.model.{path}.{side}.weight": values.contiguous()
            for path, pair in tensors.items()
            for side, values in zip(("lora_A", "lora_B"), pair, strict=True)
        }
    )


def peft_model_with(lora: LoraParameters, hf_model: Any) -> Any:
    """PEFT's LoRA around transformers' model, with the same values."""
    import peft

    names = sorted({path.rpartition(".")[2] for path in lora.tensors()})
    wrapped = peft.get_peft_model(
        hf_model,
        peft.LoraConfig(
            r=lora.spec.rank, lora_alpha=lora.spec.alpha, target_modules=names, lora_dropout=0.0, bias="none"
        ),
    )
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in lora.state_dict().items():
            parameters[f"base_model.model.{name}.default.weight"].copy_(value)
    return wrapped.eval()
