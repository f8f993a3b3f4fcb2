"""The linear layers of a step: those that read one input as one matrix, adapters on top.

Legend: `T` tokens, `I`/`O` inputs and outputs of a linear layer, `F` feed-forward width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch

from kiln_engine.model.small_head import MOST_ROWS
from kiln_nn.blocks import Weights, head_weight
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.linear import (
    LinearConfig,
    Weight,
    invariant_config_of,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
    reads_as_stored,
    reads_rounded,
    reads_rounded_groups,
)
from kiln_nn.kernels.quantised import InputOrder, QuantisedMatrix, Rows, Scheme, whole
from kiln_nn.kernels.swiglu import swiglu
from kiln_nn.weights.names import FUSED_GROUPS

_GATED = "mlp.gate_up_proj"
# In the multi-token-prediction layer also without the queries: it has keys and values of every token, and
# queries only where it drafts.
KEYS_AND_VALUES = {"self_attn.kv_proj": ("self_attn.k_proj", "self_attn.v_proj")}
_ALONE = ("linear_attn.out_proj", "self_attn.o_proj", "mlp.down_proj")


class StepAdapters(Protocol):
    """What the adapters of one step add to linear layers, which are named by their fused path."""

    def begin(self, path: str, x_TI: torch.Tensor) -> Any:
        """Start what needs only x, before the base model's own product of x is launched."""

    def finish(self, path: str, x_TI: torch.Tensor, y_TO: torch.Tensor, begun: Any) -> None:
        """Add to that product in place; `begun` is what `begin` returned."""


class BaseMatrices:
    """The base model's matrices by fused path, such as `model.layers.0.mlp.gate_up_proj`.

    Parts that lie back to back in the weight arena are one view of it; others stay apart, and so do
    quantised parts from those that are not. Nothing is copied either way. If they are batch-invariant,
    the kernels have one tiling for every number of tokens, and a step with adapters runs the same ones as
    a step without. Few rows read `small_head_VD` where there is one; if they are batch-invariant, any
    number does.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        small_head_VD: QuantisedMatrix | None = None,
        is_batch_invariant: bool = False,
    ) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._parts: dict[str, tuple[Weight, ...]] = {}
        for index, kind in enumerate(config.layer_types):
            mixer = "linear_attn." if kind == "linear_attention" else "self_attn."
            groups = {**FUSED_GROUPS, **{name: (name,) for name in _ALONE}}
            for name, parts in groups.items():
                if name.startswith((mixer, "mlp.")):
                    prefix = f"model.layers.{index}"
                    self._parts[f"{prefix}.{name}"] = _joined(
                        [weights[f"{prefix}.{part}.weight"] for part in parts]
                    )
        if "mtp.fc.weight" in weights:
            self._parts |= _mtp_parts(weights)
        self.head_VD = head_weight(config, weights)
        self._small_head_VD = small_head_VD

    def head(self, x_TD: torch.Tensor) -> Weight:
        """What a step makes the logits of these rows with."""
        small_VD = self._small_head_VD
        if small_VD is None or self.is_batch_invariant:
            return self.head_VD if small_VD is None else small_VD
        # A GPU whose kernels do not read the copy as it is would make a whole one of it in every step.
        is_read = x_TD.device.type == "cpu" or reads_as_stored(x_TD, small_VD)
        return small_VD if len(x_TD) <= MOST_ROWS and is_read else self.head_VD

    def parts(self, path: str) -> tuple[Weight, ...]:
        """The layer's matrices `[O, I]`, to be read as one on top of the other."""
        return self._parts[path]

    def tiling(self, weight_OI: Weight) -> LinearConfig | None:
        """How the kernels must be cut for this matrix; None leaves it to them."""
        return invariant_config_of(weight_OI) if self.is_batch_invariant else None


@dataclass(frozen=True)
class Linears:
    """The linear layers of one step, with each row's adapters where there are any."""

    base: BaseMatrices
    adapters: StepAdapters | None = None

    def reads_rounded(self, path: str, x_TI: torch.Tensor) -> InputOrder | None:
        """In which order `apply`, or `gated` where the layer is gated, reads such rows in E4M3, if it does.

        Where it does, x is best rounded by the kernel that makes it; `x_TI` has only its shape and format.
        """
        if self.base.is_batch_invariant:
            return None
        parts = self.base.parts(path)
        return reads_rounded(x_TI, parts, is_gated=path.endswith(_GATED) and self._is_gated_at_once(parts))

    def reads_rounded_groups(self, path: str, x_TI: torch.Tensor) -> bool:
        """Whether `partials` reads such rows in E4M3, with a scale for each 128 inputs; else as above."""
        (weight_OI,) = self.base.parts(path)
        return not self.base.is_batch_invariant and reads_rounded_groups(x_TI, weight_OI)

    def apply(self, path: str, x: Rows) -> torch.Tensor:
        """Outputs of all the layers fused under `path`, side by side: `[T, O]`."""
        parts = self.base.parts(path)
        if self.adapters is None:
            return self._side_by_side(x, parts)
        begun = self.adapters.begin(path, whole(x))
        y_TO = self._side_by_side(x, parts, shows_producers=True)
        self.adapters.finish(path, whole(x), y_TO, begun)
        return y_TO

    def gated(self, path: str, x: Rows) -> torch.Tensor:
        """`silu(gate(x)) * up(x)` of the layers fused under `path`, `[T, F]`."""
        parts = self.base.parts(path)
        if self._is_gated_at_once(parts):
            return linear_swiglu(x, parts[0])
        return swiglu(*self.apply(path, x).chunk(2, dim=1))

    def partials(self, path: str, x: Rows) -> torch.Tensor:
        """Outputs for `add_rms_norm`: partial sums `[S, T, O]`, with what adapters add in the first one."""
        (weight_OI,) = self.base.parts(path)
        if self.adapters is None:
            return self._partial_sums(x, weight_OI)
        begun = self.adapters.begin(path, whole(x))
        y_STO = self._partial_sums(x, weight_OI, shows_producers=True)
        self.adapters.finish(path, whole(x), y_STO[0], begun)
        return y_STO

    def head(
        self, x_TD: torch.Tensor, out_TV: torch.Tensor | None = None, *, num_tokens: int | None = None
    ) -> torch.Tensor:
        """Logits `[T, V]` in float32, in `out_TV` if it is given; of the first `num_tokens` tokens alone."""
        head_VD = self.base.head(x_TD)
        if isinstance(head_VD, QuantisedMatrix):
            head_VD = head_VD.rows(0, num_tokens or head_VD.shape[0])
        else:
            head_VD = head_VD[:num_tokens]
        return linear(x_TD, head_VD, out_dtype=torch.float32, out=out_TV, config=self.base.tiling(head_VD))

    def _is_gated_at_once(self, parts: tuple[Weight, ...]) -> bool:
        """Whether one kernel computes gate, up and what becomes of them: adapters come in between."""
        return self.adapters is None and len(parts) == 1 and not self.base.is_batch_invariant

    def _side_by_side(
        self, x: Rows, parts: tuple[Weight, ...], *, shows_producers: bool = False
    ) -> torch.Tensor:
        if len(parts) > 1:
            is_invariant = self.base.is_batch_invariant
            return linear_beside(x, parts, is_invariant=is_invariant, shows_producers=shows_producers)
        (weight_OI,) = parts
        return linear(x, weight_OI, config=self.base.tiling(weight_OI), shows_producers=shows_producers)

    def _partial_sums(self, x: Rows, weight_OI: Weight, *, shows_producers: bool = False) -> torch.Tensor:
        # Kept apart they meet what adapters add in the same order, however many tokens there are.
        return linear_partials(
            x,
            weight_OI,
            config=self.base.tiling(weight_OI),
            shows_producers=shows_producers,
            is_apart=self.base.is_batch_invariant,
        )


def _mtp_parts(weights: Weights) -> dict[str, tuple[Weight, ...]]:
    """The matrices of the multi-token-prediction layer."""
    prefix = "mtp.layers.0"
    groups = {**FUSED_GROUPS, **KEYS_AND_VALUES, **{name: (name,) for name in _ALONE}}
    parts = {
        f"{prefix}.{name}": _joined([weights[f"{prefix}.{part}.weight"] for part in group])
        for name, group in groups.items()
        if not name.startswith("linear_attn.")
    }
    return {"mtp.fc": (weights["mtp.fc.weight"],), **parts}


def _joined(parts: list[Weight]) -> tuple[Weight, ...]:
    """The fewest matrices that hold these rows: one view over those that lie back to back."""
    joined: list[Weight] = []
    for _, run in groupby(parts, key=_scheme):
        joined.extend(_joined_alike(list(run)))
    return tuple(joined)


def _scheme(part: Weight) -> Scheme | None:
    return part.scheme if isinstance(part, QuantisedMatrix) else None


def _joined_alike(parts: list[Weight]) -> list[Weight]:
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if tensors:
        view = _one_view(tensors)
        return parts if view is None else [view]
    matrices = [part for part in parts if isinstance(part, QuantisedMatrix)]
    values, scales = (_one_view([getattr(m, name) for m in matrices]) for name in ("values", "scales"))
    if values is None or scales is None:
        return parts
    return [QuantisedMatrix(matrices[0].scheme, values, scales)]


def _one_view(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """One view over matrices that lie back to back; None if they do not."""
    is_adjacent = all(
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.data_ptr() + first.nbytes == second.data_ptr()
        and first.dtype == second.dtype
        for first, second in pairwise(parts)
    )
    if not is_adjacent:
        return None
    num_rows, num_columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    return parts[0].as_strided((num_rows, num_columns), (num_columns, 1))
