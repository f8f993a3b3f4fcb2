"""Low-rank updates of linear layers: one adapter, or many at once over the tables that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kiln_nn.kernels.checks import ShapeMismatch, check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.lora.reference import AdapterStack, lora_add_reference_, lora_add_stacked_
from kiln_nn.kernels.lora.rows import (
    DECODE_TILE_TOKENS,
    NO_TOKEN,
    PREFILL_TILE_TOKENS,
    AdapterUse,
    LoraRows,
    RowsShape,
    TokenGroup,
    pack_exactly,
    pack_groups,
)
from kiln_nn.kernels.lora.training import AdapterCopies, adapted_linears

if TYPE_CHECKING:
    from kiln_nn.kernels.lora.triton import Shrunk

__all__ = [
    "DECODE_TILE_TOKENS",
    "NO_TOKEN",
    "PREFILL_TILE_TOKENS",
    "AdapterCopies",
    "AdapterStack",
    "AdapterUse",
    "LoraRows",
    "RowsShape",
    "TokenGroup",
    "adapted_linears",
    "lora_add_",
    "lora_add_stacked_",
    "lora_shrink",
    "pack_exactly",
    "pack_groups",
]


def lora_shrink(
    x_TI: torch.Tensor, a_SQI: torch.Tensor, rows: LoraRows, module_bounds: Sequence[int]
) -> Shrunk | None:
    """`A x` of each token's adapters, the half of `lora_add_` that needs no y.

    Launched before the product that makes y, it runs while that one fetches its first weights. What
    comes between it and `lora_add_` lets its successor start only after its own producers have ended
    (`linear(..., shows_producers=True)`). None where `lora_add_` computes everything itself.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    num_modules = len(module_bounds) - 1
    check_shape("x", x_TI, (None, a_SQI.shape[2]))
    if not takes_triton(x_TI, a_SQI, rows.tiles_B4) or rows.shape.num_entries == 0:
        return None
    from kiln_nn.kernels.lora import triton

    if not triton.supports_inputs(x_TI, a_SQI, num_modules):
        return None
    config = triton.choose(
        rows.shape.tile_tokens, x_TI.shape[1], module_bounds[-1], num_modules, rows.shape.num_tiles
    )
    return triton.shrink(x_TI, a_SQI, rows, num_modules, config)


def lora_add_(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_SQI: torch.Tensor,
    b_SRO: torch.Tensor,
    rows: LoraRows,
    module_bounds: Sequence[int],
    shrunk: Shrunk | None = None,
) -> None:
    """`y += scale * B (A x)` for each token and each adapter it uses, in place, in a fixed order.

    A linear layer may be several modules side by side that read the same x: module n has outputs
    `module_bounds[n]` to `[n + 1]` and the rows `n * R` to `(n + 1) * R` of A, of which an adapter
    uses the first `rank`. B is stored rank by rank, `[S, R, O]`. Tokens without an adapter are
    not touched, and nothing of an adapter reaches tokens that do not use it, NaN included.
    On the Triton path there is no host synchronisation. `shrunk` is what `lora_shrink` gave for the
    same x, A and rows, if that ran before y was made.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    num_modules = len(module_bounds) - 1
    check_shape("x", x_TI, (y_TO.shape[0], a_SQI.shape[2]))
    check_shape("lora_B", b_SRO, (a_SQI.shape[0], None, y_TO.shape[1]))
    check_shape("lora_A", a_SQI, (None, num_modules * b_SRO.shape[1], None))
    if num_modules < 1 or module_bounds[0] != 0 or module_bounds[-1] != y_TO.shape[1]:
        raise ShapeMismatch("module_bounds", tuple(module_bounds), (0, "...", y_TO.shape[1]))
    if takes_triton(y_TO, x_TI, a_SQI, b_SRO, rows.tiles_B4):
        from kiln_nn.kernels.lora import triton

        if triton.supports(y_TO, x_TI, a_SQI, b_SRO, num_modules):
            triton.lora_add_(y_TO, x_TI, a_SQI, b_SRO, rows, module_bounds, shrunk=shrunk)
            return
    lora_add_reference_(y_TO, x_TI, a_SQI, b_SRO, rows, module_bounds)
