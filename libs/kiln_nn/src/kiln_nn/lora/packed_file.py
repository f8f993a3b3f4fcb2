"""An adapter's two files made in one go: its matrices packed on their device, then one copy.

The bytes are those that the safetensors library writes for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from kiln_nn.errors import InvalidAdapter
from kiln_nn.lora.adapter_layout import KEY_PREFIX
from kiln_nn.lora.peft_config import config_json
from kiln_nn.lora.spec import LoraSpec, target_modules

_ALIGNMENT = 8


class PackedAdapter:
    """A float32 adapter about to be written.

    Raises:
        InvalidAdapter: no tensors, a rank other than the spec's, another number format, or a value
            that is not finite.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        spec: LoraSpec,
        base_model_name: str,
    ) -> None:
        stored = {}
        for path, pair in tensors.items():
            for side, tensor, axis in zip(("lora_A", "lora_B"), pair, (0, 1), strict=True):
                if tensor.dim() != 2 or tensor.shape[axis] != spec.rank or tensor.dtype != torch.float32:
                    raise InvalidAdapter(
                        f"{path}.{side} is {list(tensor.shape)} of {tensor.dtype}, not float32 of rank {spec.rank}"
                    )
                stored[f"{KEY_PREFIX}{path}.{side}.weight"] = tensor.detach()
        if not stored:
            raise InvalidAdapter("the adapter has no tensors")
        names = sorted(stored)
        self._flat = torch.cat([stored[name].reshape(-1) for name in names])
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(self._flat)):
            bad = next(name for name in names if not bool(stored[name].isfinite().all()))
            raise InvalidAdapter(f"{bad} holds NaN or infinity")
        self._header = _header({name: stored[name] for name in names})
        self.config_json = config_json(spec, target_modules(tensors), base_model_name)

    @property
    def nbytes(self) -> int:
        return len(self._header) + self._flat.nbytes

    def write_to(self, file_u8: torch.Tensor) -> None:
        """Write adapter_model.safetensors into `nbytes` bytes of host memory."""
        num_header = len(self._header)
        file_u8[:num_header].copy_(torch.frombuffer(bytearray(self._header), dtype=torch.uint8))
        file_u8[num_header:].view(torch.float32).copy_(self._flat)


def _header(stored: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in stored.items():
        end = position + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
