"""Adapters on disk and on the wire: PEFT's two files, read strictly and written reproducibly.

`adapter_model.safetensors` holds, for each adapted linear layer, lora_A [rank, in] and
lora_B [out, rank] under `base_model.model.<module path>.`; pickled weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidAdapter, UnsafeCheckpoint
from kiln_nn.lora.adapter_layout import ADAPTER_DTYPES, KEY_PREFIX, file_header, read_layout
from kiln_nn.lora.peft_config import config_json
from kiln_nn.lora.spec import LoraSpec, target_modules
from kiln_nn.weights.host_memory import readonly_u8

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Module path -> (A [rank, in], B [out, rank]).
AdapterTensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Adapter:
    """An adapter checked against its base model.

    `tensors` may leave out layers (PEFT's layers_to_transform): those stay the base's.
    """

    spec: LoraSpec
    tensors: AdapterTensors
    base_model_name: str


def write_adapter(
    folder: str | Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    spec: LoraSpec,
    base_model_name: str,
) -> None:
    """Write both files into `folder`; the same adapter gives the same bytes.

    Raises:
        InvalidAdapter: no tensors, a rank other than the spec's, or a value that is not finite.
    """
    config_text, weights = serialize_adapter(tensors, spec, base_model_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_text, encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(weights)


def serialize_adapter(
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], spec: LoraSpec, base_model_name: str
) -> tuple[str, bytes]:
    """The text of adapter_config.json and the bytes of adapter_model.safetensors.

    Raises:
        InvalidAdapter: as write_adapter.
    """
    if not tensors:
        raise InvalidAdapter("the adapter has no tensors")
    stored = {}
    for path, (a, b) in tensors.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != spec.rank or b.shape[1] != spec.rank:
            raise InvalidAdapter(
                f"{path}: A {list(a.shape)} and B {list(b.shape)} are not of rank {spec.rank}"
            )
        for side, tensor in (("lora_A", a), ("lora_B", b)):
            _check_values(f"{path}.{side}", tensor)
            stored[f"{KEY_PREFIX}{path}.{side}.weight"] = tensor.detach().cpu().contiguous()
    config_text = config_json(spec, target_modules(tensors), base_model_name)
    return config_text, save(stored, metadata={"format": "pt"})


def read_adapter(folder: str | Path, model: ModelConfig) -> Adapter:
    """Read a PEFT folder and check it against `model`.

    Raises:
        UnsafeCheckpoint: only pickled weights are there.
        InvalidAdapter, UnsupportedAdapter: as parse_adapter.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise UnsafeCheckpoint(f"{folder} holds pickled adapter weights only (adapter_model.bin)")
    try:
        return parse_adapter((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes(), model)
    except OSError as error:
        raise InvalidAdapter(f"the adapter folder cannot be read: {error}") from error


def parse_adapter(config_text: str | bytes, weights: bytes, model: ModelConfig) -> Adapter:
    """Read an adapter from the contents of its two files and check it against `model`.

    Raises:
        InvalidAdapter: not safetensors; an unknown, missing or misshapen tensor; NaN or infinity.
        UnsupportedAdapter: a PEFT feature beyond plain LoRA.
    """
    file_u8 = readonly_u8(weights)
    layout = read_layout(config_text, file_header(file_u8), len(weights), model)
    layout.check_values(file_u8)
    return Adapter(layout.spec, layout.views(file_u8), layout.base_model_name)


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in ADAPTER_DTYPES:
        raise InvalidAdapter(f"{name} is {tensor.dtype}, a 16- or 32-bit float is needed")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapter(f"{name} holds NaN or infinity")
