"""What an adapter adapts: its rank, its scaling, and the linear layers it touches.

Paper: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kiln_nn.config import LayerType, ModelConfig
from kiln_nn.errors import InvalidLoraSpec, name_list
from kiln_nn.weights.names import expected_tensors

_MIXER_TARGETS: dict[LayerType, tuple[str, ...]] = {
    "linear_attention": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "full_attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
_MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
_ATTENTION_TARGETS = _MIXER_TARGETS["linear_attention"] + _MIXER_TARGETS["full_attention"]

# The linear layers an adapter may touch, per kind of decoder layer.
LORA_TARGETS: dict[LayerType, tuple[str, ...]] = {
    kind: mixer + _MLP_TARGETS for kind, mixer in _MIXER_TARGETS.items()
}


@dataclass(frozen=True)
class LoraSpec:
    """Rank, alpha and targets of one adapter.

    `targets`: "all", "attention" (the mixers of both layer kinds), "mlp", or names of linear
    layers such as ("q_proj", "down_proj").

    Raises:
        InvalidLoraSpec: a rank below 1, an alpha that is not positive, or an unknown target.
    """

    rank: int
    alpha: float
    targets: Literal["all", "attention", "mlp"] | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidLoraSpec(f"rank is {self.rank!r}")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise InvalidLoraSpec(f"alpha is {self.alpha!r}")
        known = _ATTENTION_TARGETS + _MLP_TARGETS
        unknown = [name for name in self.target_names if name not in known]
        if unknown or not self.target_names:
            raise InvalidLoraSpec(f"targets {self.targets!r}: {name_list(unknown) or 'nothing'} to adapt")

    @property
    def scaling(self) -> float:
        """Factor on B·A·x."""
        return self.alpha / self.rank

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targeted linear layers' own names, groups spelled out, in the model's order."""
        if self.targets == "all":
            return _ATTENTION_TARGETS + _MLP_TARGETS
        if self.targets == "attention":
            return _ATTENTION_TARGETS
        if self.targets == "mlp":
            return _MLP_TARGETS
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)


def adapter_table(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear layer an adapter may touch, by module path.

    Paths are canonical, e.g. `model.layers.0.mlp.gate_proj`. Embedding, head and the
    multi-token-prediction layers are not among them.
    """
    adaptable = set(_ATTENTION_TARGETS + _MLP_TARGETS)
    table = {}
    for name, tensor in expected_tensors(config, include_mtp=False).items():
        module_path = name.removesuffix(".weight")
        if module_path.rpartition(".")[2] in adaptable:
            out_features, in_features = tensor.shape
            table[module_path] = (in_features, out_features)
    return table


def lora_shapes(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """The part of adapter_table that `spec` targets: A is [rank, in], B is [out, rank].

    Raises:
        InvalidLoraSpec: none of the targets exists in this model.
    """
    wanted = set(spec.target_names)
    shapes = {path: size for path, size in adapter_table(config).items() if path.rpartition(".")[2] in wanted}
    if not shapes:
        raise InvalidLoraSpec(f"targets {spec.targets!r}: none of them exists in this model")
    return shapes
