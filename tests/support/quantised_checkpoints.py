"""Quantised checkpoint folders of a tiny model, as other tools write them; packed number by number.

Nothing of Kiln's packing is used, so that reading is compared with the formats' descriptions. Each
builder returns the weights that a reader must find.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kiln_nn.weights.names import is_quantisable
from tests.support.tiny_models import WHOLE_GROUPS, make_checkpoint

GROUP = 128
Parts = dict[str, torch.Tensor]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs that a word of AutoAWQ holds, from its lowest bits

COMPRESSED_INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}
COMPRESSED_FP8: dict[str, Any] = {
    **COMPRESSED_INT4,
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
        }
    },
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "desc_act": False,
}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def compressed_int4(weight_OI: np.ndarray, dtype: torch.dtype = torch.bfloat16) -> tuple[Parts, np.ndarray]:
    """Symmetric groups of 128, scales in `dtype`."""
    numbers, scales = _symmetric(weight_OI, dtype)
    parts = {
        "weight_packed": _words(numbers + 8),
        "weight_scale": torch.tensor(scales).to(dtype),
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    return parts, numbers * scales.repeat(GROUP, 1)


def compressed_fp8(weight_OI: np.ndarray) -> tuple[Parts, np.ndarray]:
    """A scale an output, in bfloat16."""
    scale = torch.tensor(np.abs(weight_OI).max(1, keepdims=True) / 400).bfloat16()
    values = (torch.tensor(weight_OI) / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, (values.float() * scale.float()).numpy()


def gptq(weight_OI: np.ndarray, zero: int = 7) -> tuple[Parts, np.ndarray]:
    """As AutoGPTQ writes it: packed along the inputs, zero points stored one lower."""
    numbers, scales = _symmetric(weight_OI, torch.float16)
    num_outputs, num_inputs = weight_OI.shape
    parts = {
        "qweight": _words(numbers + 8).t().contiguous(),
        "scales": torch.tensor(scales.T).half().contiguous(),
        "qzeros": _words(np.full((num_inputs // GROUP, num_outputs), zero)),
        "g_idx": torch.arange(num_inputs, dtype=torch.int32) // GROUP,
    }
    return parts, numbers * scales.repeat(GROUP, 1)


def awq(weight_OI: np.ndarray, *, is_symmetric: bool = False) -> tuple[Parts, np.ndarray]:
    """As AutoAWQ writes it: packed along the outputs in its own order, with zero points."""
    if is_symmetric:
        numbers, scales = _symmetric(weight_OI, torch.float16)
        numbers, zeros = numbers + 8, np.full_like(scales, 8)
    else:
        grouped = weight_OI.reshape(len(weight_OI), -1, GROUP)
        low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
        scales = ((high - low) / 15).astype(np.float16).astype(np.float32)
        zeros = np.round(-low / scales).clip(0, 15)
        numbers = np.round(weight_OI / scales.repeat(GROUP, 1)) + zeros.repeat(GROUP, 1)
        numbers = numbers.clip(0, 15)
    parts = {
        "qweight": _words(_in_awq_order(numbers.T)),
        "scales": torch.tensor(scales.T).half().contiguous(),
        "qzeros": _words(_in_awq_order(zeros.T)),
    }
    return parts, (numbers - zeros.repeat(GROUP, 1)) * scales.repeat(GROUP, 1)


def write_quantised(
    folder: Path,
    config: dict[str, Any],
    pack: Callable[[np.ndarray], tuple[Parts, np.ndarray]],
    **overrides: Any,
) -> dict[str, torch.Tensor]:
    """A tiny checkpoint whose large matrices are packed; returns what each of them is worth."""
    layers = {"layer_types": ("linear_attention", "full_attention")}
    make_checkpoint(folder, dtype=torch.bfloat16, **WHOLE_GROUPS, **layers, **overrides)
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not is_quantisable(name.replace("model.language_model.", "model.", 1)):
            stored[name] = tensor
            continue
        parts, weight_OI = pack(tensor.float().numpy())
        stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
        expected[name.replace("model.language_model.", "model.", 1)] = torch.tensor(weight_OI).float()
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config=config)
    return expected


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _symmetric(weight_OI: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of -8 to 7 and the scales `[O, I / 128]` as `dtype` holds them."""
    grouped = weight_OI.reshape(weight_OI.shape[0], -1, GROUP)
    scales = torch.tensor(np.abs(grouped).max(2) / 7.5).to(dtype).float().numpy()
    return np.round(weight_OI / scales.repeat(GROUP, 1)).clip(-8, 7), scales


def _words(numbers: np.ndarray) -> torch.Tensor:
    """Eight numbers of 0 to 15 a word, along the last dimension, the first in the lowest bits."""
    shifted = numbers.reshape(len(numbers), -1, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
    return torch.tensor(np.bitwise_or.reduce(shifted, axis=2).view(np.int32))


def _in_awq_order(numbers: np.ndarray) -> np.ndarray:
    rows, columns = numbers.shape
    return numbers.reshape(rows, columns // 8, 8)[..., list(_AWQ_ORDER)].reshape(rows, columns)
