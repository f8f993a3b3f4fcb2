"""Low-rank adaptation in plain torch.

Legend: `T` tokens, `I` inputs, `O` outputs, `r` rank, `R` the tables' rank, `S` adapters in the
tables, `Q` rows of A (of all modules side by side), `N` modules, `M` tokens of a tile.

Paper: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype
from kiln_nn.kernels.lora.rows import LoraRows


def lora_add_reference_(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_SQI: torch.Tensor,
    b_SRO: torch.Tensor,
    rows: LoraRows,
    module_bounds: Sequence[int],
) -> None:
    """`y += scale * B (A x)` for each token and each adapter it uses, in place.

    Written to be read: one adapter of one tile at a time, their numbers read on the host.
    """
    dtype = accumulation_dtype(x_TI, y_TO)
    a_SNRI = a_SQI.unflatten(1, (len(module_bounds) - 1, -1))
    for tile, (first, end, _, _) in enumerate(rows.tiles_B4.tolist()):
        tokens_M = rows.tokens_BM[tile].long()
        total_MO = torch.zeros(len(tokens_M), y_TO.shape[1], dtype=dtype, device=y_TO.device)
        for entry in range(first, end):
            adapter, rank = int(rows.adapters_E[entry]), int(rows.ranks_E[entry])
            scale_M = rows.scales_EM[entry].to(dtype)
            is_used_M = scale_M != 0
            x_MI = x_TI[tokens_M[is_used_M]].to(dtype)
            for module, (start, stop) in enumerate(pairwise(module_bounds)):
                h_Mr = F.linear(x_MI, a_SNRI[adapter, module, :rank].to(dtype))
                h_Mr = h_Mr * scale_M[is_used_M, None]
                total_MO[is_used_M, start:stop] += h_Mr @ b_SRO[adapter, :rank, start:stop].to(dtype)
        is_used_M = (tokens_M >= 0) & (end > first)
        tokens = tokens_M[is_used_M]
        y_TO[tokens] = (y_TO[tokens].to(dtype) + total_MO[is_used_M]).to(y_TO.dtype)


@dataclass(frozen=True)
class AdapterStack:
    """Adapters side by side: A of all of them for the first module, for the second and so on.

    `b_parts`: each module's B, `[Q / N, outputs]` in one stretch of memory.
    """

    a_QI: torch.Tensor
    b_parts: tuple[torch.Tensor, ...]
    bounds: tuple[int, ...]


def lora_add_stacked_(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    stack: AdapterStack,
    factors_TQ: torch.Tensor,
    is_unused_TQ: torch.Tensor | None,
) -> None:
    """The same with the step's adapters side by side: few products whatever the mixture, in place.

    Where no kernel runs this is the fast way. The factors are the scales of the adapter that a
    row of A belongs to. B must be finite.
    """
    h_TQ = F.linear(x_TI, stack.a_QI)
    if is_unused_TQ is not None:
        # Not by a product: an adapter's overflow times zero would be a NaN for those without it.
        h_TQ.masked_fill_(is_unused_TQ, 0.0)
    h_TQ.mul_(factors_TQ)
    if len(stack.b_parts) == 1:
        y_TO.addmm_(h_TQ, stack.b_parts[0])
        return
    parts = zip(h_TQ.chunk(len(stack.b_parts), dim=1), stack.b_parts, pairwise(stack.bounds), strict=True)
    for h, b, (start, end) in parts:
        y_TO[:, start:end].addmm_(h, b)
