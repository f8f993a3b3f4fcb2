"""What an adapter adapts: its rank, its scaling, and the linear layers it touches.

Paper: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kiln_nn.config import LayerType, ModelConfig
from kiln_nn.errors import InvalidLoraSpec, name_list
from kiln_nn.weights.names import MTP_PREFIX, expected_tensors

_MIXER_TARGETS: dict[LayerType, tuple[str, ...]] = {
    "linear_attention": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "full_attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
_MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
# Of a multi-token-prediction layer, whose mixer is attention; `fc` joins its two inputs.
_MTP_TARGETS = ("fc", *_MIXER_TARGETS["full_attention"], *_MLP_TARGETS)
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
    `with_mtp`: every linear layer of the multi-token-prediction layers as well, whatever the targets.

    Raises:
        InvalidLoraSpec: a rank below 1, an alpha that is not positive, or an unknown target.
    """

    rank: int
    alpha: float
    targets: Literal["all", "attention", "mlp"] | tuple[str, ...] = "all"
    with_mtp: bool = False

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
    multi-token-prediction layers (`mtp_table`) are not among them.
    """
    adaptable = set(_ATTENTION_TARGETS + _MLP_TARGETS)
    return {path: size for path, size in _linear_layers(config, adaptable) if not is_mtp(path)}


def mtp_table(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The same of the multi-token-prediction layers, e.g. `mtp.fc`; empty for a model without one."""
    return {path: size for path, size in _linear_layers(config, set(_MTP_TARGETS)) if is_mtp(path)}


def is_mtp(module_path: str) -> bool:
    """Whether a linear layer belongs to the multi-token-prediction layers."""
    return module_path.startswith(MTP_PREFIX)


def _linear_layers(config: ModelConfig, names: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, tensor in expected_tensors(config, include_mtp=True).items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in names:
            out_features, in_features = tensor.shape
            yield path, (in_features, out_features)


def lora_shapes(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """What `spec` targets of adapter_table, then of mtp_table: A is [rank, in], B is [out, rank].

    Raises:
        InvalidLoraSpec: none of the targets exists in this model, or there is no layer to predict more.
    """
    wanted = set(spec.target_names)
    shapes = {path: size for path, size in adapter_table(config).items() if path.rpartition(".")[2] in wanted}
    if not shapes:
        raise InvalidLoraSpec(f"targets {spec.targets!r}: none of them exists in this model")
    if spec.with_mtp:
        of_mtp = mtp_table(config)
        if not of_mtp:
            raise InvalidLoraSpec("this model has no multi-token-prediction layer to adapt")
        shapes |= of_mtp
    return shapes


def target_modules(module_paths: Iterable[str]) -> list[str]:
    """What adapter_config.json says of an adapter on these layers.

    Names of the main model's, whole paths of the others: a model without a multi-token-prediction layer,
    which is how transformers loads it, finds no layer of its own under those.
    """
    paths = [*module_paths]
    names = sorted({path.rpartition(".")[2] for path in paths if not is_mtp(path)})
    return names + sorted(path for path in paths if is_mtp(path))
