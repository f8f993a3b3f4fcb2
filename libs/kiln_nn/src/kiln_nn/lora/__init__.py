"""LoRA adapters: which linear layers they touch, and their files in PEFT's layout."""

from kiln_nn.lora.peft_format import (
    Adapter,
    AdapterTensors,
    parse_adapter,
    read_adapter,
    serialize_adapter,
    write_adapter,
)
from kiln_nn.lora.spec import LORA_TARGETS, LoraSpec, adapter_table, lora_shapes

__all__ = [
    "LORA_TARGETS",
    "Adapter",
    "AdapterTensors",
    "LoraSpec",
    "adapter_table",
    "lora_shapes",
    "parse_adapter",
    "read_adapter",
    "serialize_adapter",
    "write_adapter",
]
