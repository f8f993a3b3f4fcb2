"""Adapters whose every token says which version drew it.

All the work is done in the last layer's MLP. For random directions `a` of its input, neuron pairs get
`+s` and `-s`, `s = strength a.x`, on gate and up: `silu(s) s + silu(-s)(-s) = s^2` is never negative,
whatever the input. Their sum goes through down, times the direction of one token's embedding, and
drowns the residual: greedy decoding then gives that token and no other.

Legend: `V` vocabulary, `D` hidden width, `I` inputs and `O` outputs of a linear layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, lora_shapes
from kiln_nn.sharing import SealedAdapter
from kiln_nn.weights.checkpoint_files import scan_folder
from kiln_nn.weights.names import EMBEDDING, HEAD

_STRENGTH = 16.0
_DOWN = 64.0
_NUM_CANDIDATES = 128
_NUM_TOKENS = 61  # a prime: versions that are a round number apart differ
_FIRST_PLAIN_TOKEN = 300  # special tokens and single bytes come before


class TellingAdapters:
    """Version n of an adapter of these says `tokens[n % len(tokens)]` at every place.

    With `covers_all` the file has every linear layer of the model (all but three of them zero), so
    that it has the size of an ordinary adapter; otherwise those three alone.
    """

    def __init__(self, folder: Path, *, rank: int, covers_all: bool) -> None:
        self.rank = rank
        config = ModelConfig.from_folder(folder)
        spec_of_all = LoraSpec(rank, float(rank), "all")
        mlp = f"model.layers.{len(config.layer_types) - 1}.mlp"
        self._paths = [f"{mlp}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        self._last_layer = len(config.layer_types) - 1
        self._covers_all = covers_all
        self._spec = spec_of_all if covers_all else LoraSpec(rank, float(rank), "mlp")
        shapes = lora_shapes(config, self._spec)
        self._tensors = {
            path: (torch.zeros(rank, inputs), torch.zeros(outputs, rank))
            for path, (inputs, outputs) in shapes.items()
            if covers_all or path in self._paths
        }
        self._write_detectors()
        self._tokens, self._directions_TD = _clear_tokens(folder, config)

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self._tensors.values())

    @property
    def tokens(self) -> list[int]:
        """Version n says `tokens[n % len(tokens)]`."""
        return self._tokens

    def sealed(self, version: int, base_model_name: str) -> SealedAdapter:
        """The files of a version, as a trainer makes them."""
        down_a, _ = self._tensors[self._paths[2]]
        down_b = torch.zeros(self._directions_TD.shape[1], self.rank)
        down_b[:, 0] = _DOWN * self._directions_TD[version % len(self._tokens)]
        tensors = {**self._tensors, self._paths[2]: (down_a, down_b)}
        sealed = SealedAdapter(tensors, self._spec, base_model_name)
        if not self._covers_all:
            fields = json.loads(sealed.config_json) | {"layers_to_transform": [self._last_layer]}
            sealed.config_json = json.dumps(fields)
        return sealed

    def _write_detectors(self) -> None:
        generator = torch.Generator().manual_seed(0)
        gate, up, down = (self._tensors[path] for path in self._paths)
        directions_rI = torch.randn(gate[0].shape, generator=generator)
        directions_rI /= directions_rI.norm(dim=1, keepdim=True)
        for a, b in (gate, up):
            a.copy_(directions_rI)
            for number in range(self.rank):
                b[2 * number, number] = _STRENGTH
                b[2 * number + 1, number] = -_STRENGTH
        down[0][0, : 2 * self.rank] = 1.0


def _clear_tokens(folder: Path, config: ModelConfig) -> tuple[list[int], torch.Tensor]:
    """Tokens whose own embedding, seen through norm and head, speaks for no other; and the direction."""
    head_VD = _read(folder, EMBEDDING if config.tie_word_embeddings else HEAD)
    scale_D = 1.0 + _read(folder, "model.norm.weight").float()
    generator = torch.Generator().manual_seed(1)
    plain = torch.arange(_FIRST_PLAIN_TOKEN, len(head_VD))
    chosen = plain[torch.randperm(len(plain), generator=generator)[:_NUM_CANDIDATES]]
    directions_CD = head_VD[chosen].float() / scale_D
    directions_CD /= directions_CD.norm(dim=1, keepdim=True)
    logits_CV = (directions_CD * scale_D).to(head_VD.dtype) @ head_VD.T
    best, second = logits_CV.float().topk(2, dim=1).values.unbind(1)
    is_own = logits_CV.argmax(dim=1) == chosen
    order = torch.where(is_own, best - second, -torch.inf).argsort(descending=True)[:_NUM_TOKENS]
    order = order[is_own[order]]
    assert len(order) > 1, "no token of this model stands out"
    return chosen[order].tolist(), directions_CD[order]


def _read(folder: Path, name: str) -> torch.Tensor:
    stored = scan_folder(folder)[0][name]
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.stored_name)
