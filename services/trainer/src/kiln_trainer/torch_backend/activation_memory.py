"""Which layers keep their activations for the backward pass, and which compute them again.

Keeping is faster by a third of the matrix products, and costs memory beside an engine that owns most of
the device. What a token costs is measured once per kind of adapter, on a short pass through the model.

Legend: `T` tokens, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from kiln_nn.blocks import LinearFn
from kiln_nn.kernels.quantised import tensors_of
from kiln_nn.packed_model import PackedModel

_PROBE_TOKENS = 256
_MOST_BYTES_ON_GPU = 19 << 30
_MOST_BYTES_ON_CPU = 2 << 30
# The head's logits and factors of one chunk, and what the allocator cannot use.
_HEAD_BYTES_ON_GPU = 2 << 30
# A layer that is computed again holds its activations, and gradients of about as many bytes.
_LAYERS_AT_WORK = 2


@dataclass(frozen=True)
class ActivationPlan:
    """What a micro-batch's activations may take, and what they do take.

    `kept_bytes`: of one token in one layer that keeps everything. `carried_bytes`: of one token in the
    whole model if every layer is computed again.
    """

    num_layers: int
    kept_bytes: float
    carried_bytes: int
    budget_bytes: int

    @classmethod
    def measure(cls, model: PackedModel, linear: LinearFn, device: torch.device) -> ActivationPlan:
        """Run a few tokens through all layers and weigh what autograd keeps."""
        config, weights = model.config, model.weights
        num_tokens = min(_PROBE_TOKENS, config.max_position_embeddings)
        num_bytes = _kept_bytes(model, linear, torch.zeros(num_tokens, dtype=torch.int64, device=device))
        itemsize = next(iter(weights.values())).element_size()
        # Every layer's input, what goes into and out of the head, and what attention gave.
        num_attention = sum(kind == "full_attention" for kind in config.layer_types)
        num_carried = (config.num_layers + 2) * config.hidden_size
        num_carried += num_attention * config.num_attention_heads * config.head_dim
        return cls(
            num_layers=config.num_layers,
            kept_bytes=num_bytes / num_tokens / config.num_layers,
            carried_bytes=num_carried * itemsize,
            budget_bytes=_budget_bytes(device),
        )

    @property
    def least_token_bytes(self) -> float:
        """Of one token if every layer is computed again."""
        return self.carried_bytes + _LAYERS_AT_WORK * self.kept_bytes

    def num_kept_layers(self, num_tokens: int) -> int:
        """How many layers of a micro-batch of `num_tokens` may keep everything."""
        per_layer = self.kept_bytes * num_tokens
        spare = self.budget_bytes - self.carried_bytes * num_tokens
        if per_layer * self.num_layers <= spare:
            return self.num_layers
        return max(0, int((spare - _LAYERS_AT_WORK * per_layer) // per_layer))


class ActivationPlans:
    """The plans of one mapped model, each measured with the first adapter of its kind."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, ActivationPlan] = {}

    def of(
        self, kind: Hashable, model: PackedModel, linear: LinearFn, device: torch.device
    ) -> ActivationPlan:
        """The plan for adapters of this kind, with what may be taken now."""
        known = self._plans.get(kind)
        if known is not None:
            return replace(known, budget_bytes=_budget_bytes(device))
        return self._plans.setdefault(kind, ActivationPlan.measure(model, linear, device))


def _kept_bytes(model: PackedModel, linear: LinearFn, token_ids_T: torch.Tensor) -> int:
    """Bytes that the backward pass of all layers would find kept, weights left out."""
    sizes: dict[int, int] = {}
    borrowed = {
        tensor.untyped_storage().data_ptr()
        for weight in model.weights.values()
        for tensor in tensors_of(weight)
    }

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in borrowed and not isinstance(tensor, torch.nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
        # A result that its own graph held would never be freed.
        return tensor.detach()

    def unchanged(tensor: Any) -> Any:
        return tensor

    kept_before, model.num_kept_layers = model.num_kept_layers, None
    try:
        with torch.enable_grad(), saved_tensors_hooks(weigh, unchanged):
            model.hidden_states(token_ids_T, (0, token_ids_T.shape[0]), linear)
    finally:
        model.num_kept_layers = kept_before
    return sum(sizes.values())


def head_bytes(device: torch.device) -> int:
    """Set aside for the head's work on a micro-batch of any size."""
    return _HEAD_BYTES_ON_GPU if device.type == "cuda" else 0


def _budget_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _MOST_BYTES_ON_CPU
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return min(_MOST_BYTES_ON_GPU, free_bytes) - _HEAD_BYTES_ON_GPU
