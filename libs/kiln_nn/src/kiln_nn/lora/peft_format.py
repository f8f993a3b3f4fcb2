"""Adapters on disk and on the wire: PEFT's two files, read strictly and written reproducibly.

`adapter_model.safetensors` holds, for each adapted linear layer, lora_A [rank, in] and
lora_B [out, rank] under `base_model.model.<module path>.`; pickled weights are never read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidAdapter, UnsafeCheckpoint, UnsupportedAdapter, name_list
from kiln_nn.lora.peft_config import PeftConfig, config_json, parse_config
from kiln_nn.lora.spec import LoraSpec, adapter_table, lora_shapes
from kiln_nn.weights.names import canonical_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Module path -> (A [rank, in], B [out, rank]).
AdapterTensors = dict[str, tuple[torch.Tensor, torch.Tensor]]

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.(?P<side>lora_[AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            stored[f"{_PREFIX}{path}.{side}.weight"] = tensor.detach().cpu().contiguous()
    target_modules = sorted({path.rpartition(".")[2] for path in tensors})
    return config_json(spec, target_modules, base_model_name), save(stored, metadata={"format": "pt"})


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
    config = parse_config(config_text)
    try:
        stored = load(weights)
    except (SafetensorError, ValueError) as error:
        raise InvalidAdapter(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error
    table = adapter_table(model)
    sides = _sort_by_module(stored, table)
    tensors = {
        path: _checked_pair(path, sides[path], table[path], config.rank) for path in table if path in sides
    }
    if not tensors:
        raise InvalidAdapter("the adapter has no tensors")
    _check_complete(config, tensors, table)
    spec = LoraSpec(config.rank, config.alpha, _targets_of(tensors, config, model))
    return Adapter(spec, tensors, config.base_model_name)


def _sort_by_module(
    stored: Mapping[str, torch.Tensor], table: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, torch.Tensor]]:
    """lora_A and lora_B by canonical module path; any other key is refused by name."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        path = canonical_name(match["path"]) if match else None
        if match is None or path is None or path not in table or match["side"] in sides.get(path, {}):
            unknown.append(key)
        else:
            sides.setdefault(path, {})[match["side"]] = tensor
    if any("lora_magnitude_vector" in key for key in unknown):
        raise UnsupportedAdapter(f"DoRA is not supported: {name_list(sorted(unknown))}")
    if unknown:
        raise InvalidAdapter(
            f"not tensors of a LoRA on this model's linear layers: {name_list(sorted(unknown))}"
        )
    return sides


def _checked_pair(
    path: str, sides: Mapping[str, torch.Tensor], size: tuple[int, int], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    in_features, out_features = size
    for side, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
        if side not in sides:
            raise InvalidAdapter(f"{path} lacks its {side}")
        if tuple(sides[side].shape) != shape:
            raise InvalidAdapter(f"{path}.{side} is {list(sides[side].shape)} instead of {list(shape)}")
        _check_values(f"{path}.{side}", sides[side])
    return sides["lora_A"], sides["lora_B"]


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise InvalidAdapter(f"{name} is {tensor.dtype}, a 16- or 32-bit float is needed")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapter(f"{name} holds NaN or infinity")


def _check_complete(
    config: PeftConfig, tensors: AdapterTensors, table: Mapping[str, tuple[int, int]]
) -> None:
    if not config.covers_all_layers or config.target_modules is None:
        return
    targets = config.target_modules
    missing = [
        path
        for path in table
        if path not in tensors and any(f".{path}".endswith(f".{target}") for target in targets)
    ]
    if missing:
        raise InvalidAdapter(f"target_modules names layers without tensors: {name_list(missing)}")


def _targets_of(
    tensors: AdapterTensors, config: PeftConfig, model: ModelConfig
) -> Literal["all", "attention", "mlp"] | tuple[str, ...]:
    """The group that the tensors are exactly, or else the linear layers' names."""
    groups: tuple[Literal["all", "attention", "mlp"], ...] = ("all", "attention", "mlp")
    for group in groups:
        if lora_shapes(model, LoraSpec(config.rank, config.alpha, group)).keys() == tensors.keys():
            return group
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in tensors))
