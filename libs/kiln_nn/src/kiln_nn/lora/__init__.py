"""LoRA adapters: which linear layers they touch, and their files in PEFT's layout."""

from kiln_nn.lora.adapter_layout import (
    ADAPTER_DTYPES,
    AdapterLayout,
    Matrix,
    file_header,
    in_file_order,
    read_layout,
)
from kiln_nn.lora.peft_format import (
    Adapter,
    AdapterTensors,
    parse_adapter,
    read_adapter,
    serialize_adapter,
    write_adapter,
)
from kiln_nn.lora.spec import LORA_TARGETS, LoraSpec, adapter_table, lora_shapes, mtp_table

__all__ = [
    "ADAPTER_DTYPES",
    "LORA_TARGETS",
    "Adapter",
    "AdapterLayout",
    "AdapterTensors",
    "LoraSpec",
    "Matrix",
    "adapter_table",
    "file_header",
    "in_file_order",
    "lora_shapes",
    "mtp_table",
    "parse_adapter",
    "read_adapter",
    "read_layout",
    "serialize_adapter",
    "write_adapter",
]
