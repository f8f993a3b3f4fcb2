"""An adapter that learns: float32 parameters beside a frozen base model.

Legend: `I` inputs and `O` outputs of a linear layer, `r` rank.

Paper: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from kiln_nn.blocks.linear import LinearFn, Weights, base_linear
from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidAdapter, name_list
from kiln_nn.kernels.lora import AdapterCopies, adapted_linears
from kiln_nn.lora.dropout import LoraDropout
from kiln_nn.lora.peft_format import AdapterTensors
from kiln_nn.lora.spec import LoraSpec, is_mtp, lora_shapes

_SIDES = ("lora_A", "lora_B")


class LoraParameters:
    """A and B of every adapted linear layer, as leaves that receive gradients.

    Usage: `model.hidden_states(ids, cu_seqlens, lora.linear_fn(weights))`; the base model
    alone, such as GRPO's reference policy, is `linear=None`.
    """

    def __init__(self, spec: LoraSpec, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy `tensors` (module path -> A `[r, I]`, B `[O, r]`) into parameters of their own."""
        self.spec = spec
        self._pairs = {
            path: (torch.nn.Parameter(a.detach().clone()), torch.nn.Parameter(b.detach().clone()))
            for path, (a, b) in tensors.items()
        }

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        spec: LoraSpec,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LoraParameters:
        """Start as PEFT does: A uniform within 1/sqrt(I), B zero, so the first step is the base model.

        The draws are made on the CPU in float32: one seed gives one adapter on every device.
        """
        tensors = fresh_tensors(lora_shapes(config, spec), spec.rank, seed)
        return cls(
            spec, {path: (a.to(device, dtype), b.to(device, dtype)) for path, (a, b) in tensors.items()}
        )

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        spec: LoraSpec,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        device: torch.device | str = "cpu",
    ) -> LoraParameters:
        """Go on from an adapter that exists and covers exactly the layers of `spec`.

        Raises:
            InvalidAdapter: it has other layers than `spec` targets, or a tensor of another shape.
        """
        shapes = lora_shapes(config, spec)
        unknown = sorted(tensors.keys() - shapes.keys())
        if unknown:
            raise InvalidAdapter(f"the adapter has layers outside its targets: {name_list(unknown)}")
        missing = sorted(shapes.keys() - tensors.keys())
        if missing:
            raise InvalidAdapter(f"the adapter lacks targeted layers: {name_list(missing)}")
        copies = {}
        for path, (num_inputs, num_outputs) in shapes.items():
            a, b = tensors[path]
            if tuple(a.shape) != (spec.rank, num_inputs) or tuple(b.shape) != (num_outputs, spec.rank):
                raise InvalidAdapter(f"{path}: A {list(a.shape)}, B {list(b.shape)} do not fit")
            copies[path] = (a.to(device, torch.float32), b.to(device, torch.float32))
        return cls(spec, copies)

    def linear_fn(self, weights: Weights, dropout: LoraDropout | None = None) -> LinearFn:
        """The base model's linear layers with this adapter added where it has one; the base is frozen."""
        base = base_linear(weights)
        copies = _Copies(self.spec.scaling)

        def linear(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pairs = [self._pairs.get(path) for path in module_paths]
            if not any(pairs):
                return base(module_paths, x)
            matrices = [weights[path + ".weight"] for path in module_paths]
            factors = dropout.factors_of(module_paths, x) if dropout is not None else None
            return adapted_linears(
                x, matrices, pairs, copies.of(tuple(module_paths), pairs, x.dtype), factors
            )

        return linear

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters as (`<module path>.lora_A` or `.lora_B`, parameter), always in one order."""
        for path, pair in self._pairs.items():
            for side, parameter in zip(_SIDES, pair, strict=True):
                yield f"{path}.{side}", parameter

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters, for an optimiser."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameters_of_mtp(self) -> list[torch.nn.Parameter]:
        """Those of the multi-token-prediction layers; they learn from a loss of their own."""
        return [parameter for path, pair in self._pairs.items() if is_mtp(path) for parameter in pair]

    def tensors(self) -> AdapterTensors:
        """The present values by module path, detached and not copied: what `write_adapter` takes."""
        return {path: (a.detach(), b.detach()) for path, (a, b) in self._pairs.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The present values by parameter name, detached and not copied: for a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's values in place.

        Raises:
            InvalidAdapter: names or shapes are not exactly this adapter's; nothing was changed.
        """
        own = dict(self.named_parameters())
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
        if wrong:
            raise InvalidAdapter(f"the checkpoint does not fit this adapter: {name_list(wrong)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def fresh_tensors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> AdapterTensors:
    """A and B of an adapter that has learned nothing, for layers of (inputs, outputs) by module path."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (num_inputs, num_outputs) in shapes.items():
        uniform = torch.rand(rank, num_inputs, generator=generator)
        tensors[path] = ((2 * uniform - 1) / num_inputs**0.5, torch.zeros(num_outputs, rank))
    return tensors


class _Copies:
    """An adapter in the base's format, copied anew only where a parameter changed since."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._kept: dict[tuple[str, ...], tuple[object, AdapterCopies]] = {}

    def of(
        self,
        module_paths: tuple[str, ...],
        pairs: Sequence[tuple[torch.nn.Parameter, torch.nn.Parameter] | None],
        dtype: torch.dtype,
    ) -> AdapterCopies:
        """Copies of these layers' pairs as they are now."""
        # torch counts what is written to a tensor: an optimiser's step and a restored checkpoint too.
        state = (dtype, *(tensor._version for pair in pairs if pair is not None for tensor in pair))
        kept = self._kept.get(module_paths)
        if kept is None or kept[0] != state:
            kept = (state, AdapterCopies.of(pairs, self._scale, dtype))
            self._kept[module_paths] = kept
        return kept[1]
