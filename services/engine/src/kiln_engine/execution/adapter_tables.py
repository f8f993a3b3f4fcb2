"""Where the numbers of resident adapters lie: two tables for each fused linear layer.

The linear layers that read the same input are one for the engine (their weights' rows are back to
back), so their adapters lie side by side too: A module after module, B rank by rank over the
outputs of all modules. An adapter that lacks a module has zeros there; beyond its rank nothing is
read. Where drafts are made by the model's multi-token-prediction layer, its linear layers are among them:
an adapter that brings no matrices for them drafts with the layer as the base model has it.

Legend: `S` slots (the first is slot 1), `N` modules of a fused layer, `R` the tables' rank, `Q` =
`N R`, `I`/`O` inputs and outputs, `r` an adapter's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kiln_engine.model.linears import KEYS_AND_VALUES
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.lora import adapter_table, mtp_table
from kiln_nn.weights.names import expected_tensors


def adapter_slot_bytes(
    config: ModelConfig, max_rank: int, dtype: torch.dtype, *, with_mtp: bool = False
) -> int:
    """Bytes of one adapter slot; `with_mtp`: also of what adapts the multi-token-prediction layer."""
    widths = sum(inputs + outputs for inputs, outputs in _linear_layers(config, with_mtp).values())
    return max_rank * widths * dtype.itemsize


def largest_matrix_bytes(config: ModelConfig, max_rank: int, *, with_mtp: bool = False) -> int:
    """Bytes of the largest A or B that an upload takes from a file."""
    return max_rank * max(map(max, _linear_layers(config, with_mtp).values())) * torch.float32.itemsize


@dataclass(frozen=True)
class AdaptedLinear:
    """The tables of one linear layer: of a fused one, or of one module as a slice of it.

    Module n has the outputs `bounds[n]` to `bounds[n + 1]`.
    """

    modules: frozenset[str]
    bounds: tuple[int, ...]
    a_SQI: torch.Tensor
    b_SRO: torch.Tensor

    @property
    def num_modules(self) -> int:
        return len(self.bounds) - 1


class AdapterTables:
    """A and B of `num_slots` adapters for every linear layer, by its fused or by its own path.

    `with_mtp`: also for those of the multi-token-prediction layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        with_mtp: bool = False,
    ) -> None:
        self.dtype, self.device = dtype, device
        self._max_rank = max_rank
        self._fused: dict[str, AdaptedLinear] = {}
        self._modules: dict[str, AdaptedLinear] = {}
        for fused_path, modules in _modules_by_fused(config, with_mtp).items():
            ((num_inputs, _), *_) = modules.values()
            bounds = (0, *accumulate(num_outputs for _, num_outputs in modules.values()))
            a_SQI = torch.zeros(num_slots, len(modules) * max_rank, num_inputs, dtype=dtype, device=device)
            b_SRO = torch.zeros(num_slots, max_rank, bounds[-1], dtype=dtype, device=device)
            fused = AdaptedLinear(frozenset(modules), bounds, a_SQI, b_SRO)
            self._fused[fused_path] = fused
            for number, path in enumerate(modules):
                self._modules[path] = self._slice(fused, number, (path,))
        self._by_path = {**self._modules, **self._fused, **self._keys_and_values(config)}

    @property
    def num_bytes(self) -> int:
        return sum(linear.a_SQI.nbytes + linear.b_SRO.nbytes for linear in self._fused.values())

    @property
    def uses_kernel(self) -> bool:
        """Whether the grouped kernel serves these tables, called from the thread that runs the steps."""
        return takes_triton(*(linear.a_SQI for linear in list(self._fused.values())[:1]))

    def get(self, path: str) -> AdaptedLinear | None:
        """The tables behind a fused linear layer's or a single module's path, if it can be adapted."""
        return self._by_path.get(path)

    def write(self, index: int, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put one adapter (module path -> A `[r, I]`, B `[O, r]`) into place `index` of the tables."""
        for path, linear in self._modules.items():
            if path in tensors:
                a_rI, b_Or = tensors[path]
                rank = a_rI.shape[0]
                linear.a_SQI[index, :rank].copy_(a_rI)
                linear.b_SRO[index, :rank].copy_(b_Or.t())
            else:
                linear.a_SQI[index].zero_()
                linear.b_SRO[index].zero_()

    def places(self, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Where adapters of a rank go, for each module: `[S, r, I]` and `[S, O, r]`."""
        return {
            path: (linear.a_SQI[:, :rank], linear.b_SRO[:, :rank].transpose(1, 2))
            for path, linear in self._modules.items()
        }

    def _keys_and_values(self, config: ModelConfig) -> dict[str, AdaptedLinear]:
        """Those of the multi-token-prediction layers, of which there are none without them."""
        found = {}
        for index in range(config.num_mtp_layers):
            prefix = f"mtp.layers.{index}"
            fused = self._fused.get(f"{prefix}.self_attn.qkv_proj")
            if fused is not None:
                for name, parts in KEYS_AND_VALUES.items():
                    paths = [f"{prefix}.{part}" for part in parts]
                    found[f"{prefix}.{name}"] = self._slice(fused, fused.num_modules - len(paths), paths)
        return found

    def _slice(self, fused: AdaptedLinear, first: int, paths: Sequence[str]) -> AdaptedLinear:
        """The modules from number `first` on."""
        end = first + len(paths)
        start, *ends = fused.bounds[first : end + 1]
        rows = slice(first * self._max_rank, end * self._max_rank)
        bounds = (0, *(each - start for each in ends))
        a_SQI, b_SRO = fused.a_SQI[:, rows], fused.b_SRO[:, :, start : ends[-1]]
        return AdaptedLinear(frozenset(paths), bounds, a_SQI, b_SRO)


def _linear_layers(config: ModelConfig, with_mtp: bool) -> dict[str, tuple[int, int]]:
    return adapter_table(config) | (mtp_table(config) if with_mtp else {})


def _modules_by_fused(config: ModelConfig, with_mtp: bool) -> dict[str, dict[str, tuple[int, int]]]:
    """Fused path -> module path -> (inputs, outputs), modules in the order of the weights' rows."""
    specs = expected_tensors(config, include_mtp=with_mtp)
    fused: dict[str, dict[str, tuple[int, int]]] = {}
    for path, sizes in _linear_layers(config, with_mtp).items():
        fused_name = specs[path + ".weight"].fused_name or path
        fused.setdefault(fused_name.removesuffix(".weight"), {})[path] = sizes
    return fused
