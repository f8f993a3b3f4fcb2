"""Depthwise causal convolution and SiLU over packed documents, in plain torch.

Legend: `T` tokens, `N` documents, `R` rows (one token each), `C` channels, `W` kernel
width, `J` = W - 1 rows of tail: the inputs just before a document's first token here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype, check_cu_seqlens, check_shape


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may reuse what serving cached
def _padded_layout(
    bounds: tuple[int, ...], tail: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices for the rows [tails and tokens], document after document.

    Returns: for each padded row its source in cat(tails, tokens); for each token the
    padded position of its output; for each document the padded rows of its new tail.
    """
    num_tails = (len(bounds) - 1) * tail
    sources: list[int] = []
    outputs: list[int] = []
    new_tails: list[int] = []
    for doc, (start, end) in enumerate(pairwise(bounds)):
        outputs.extend(range(len(sources), len(sources) + end - start))
        sources.extend(range(doc * tail, (doc + 1) * tail))
        sources.extend(range(num_tails + start, num_tails + end))
        new_tails.extend(range(len(sources) - tail, len(sources)))
    return tuple(
        torch.tensor(rows, dtype=torch.long, device=device) for rows in (sources, outputs, new_tails)
    )  # type: ignore[return-value]


def causal_conv(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    cu_seqlens: Sequence[int],
    initial_tails_NJC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve each document by itself, then apply SiLU.

    `initial_tails_NJC` are the inputs before each document's first token (zeros at a
    document's true start, which is the default).

    Returns: outputs `[T, C]` in float32 (float64 for float64 inputs), and the new tails
    `[N, J, C]` in the inputs' format, right also for documents shorter than the kernel.
    """
    num_tokens, num_channels = x_TC.shape
    width = weight_CW.shape[1]
    tail, num_docs = width - 1, len(cu_seqlens) - 1
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    check_shape("weight", weight_CW, (num_channels, None))
    if initial_tails_NJC is None:
        initial_tails_NJC = x_TC.new_zeros(num_docs, tail, num_channels)
    check_shape("initial_tails", initial_tails_NJC, (num_docs, tail, num_channels))

    sources, outputs, new_tails = _padded_layout(bounds, tail, x_TC.device)
    rows = torch.cat((initial_tails_NJC.flatten(0, 1).to(x_TC.dtype), x_TC)).index_select(0, sources)
    dtype = accumulation_dtype(x_TC)
    inputs, taps = rows.to(dtype), weight_CW.to(dtype).t()
    num_outputs = rows.shape[0] - tail
    mixed = inputs[:num_outputs] * taps[0]
    for tap in range(1, width):
        mixed = torch.addcmul(mixed, inputs[tap : tap + num_outputs], taps[tap])
    mixed = F.silu(mixed if num_docs == 1 else mixed.index_select(0, outputs))
    return mixed, rows.index_select(0, new_tails).view(num_docs, tail, num_channels)


def causal_conv_step(x_RC: torch.Tensor, tails_RJC: torch.Tensor, weight_CW: torch.Tensor) -> torch.Tensor:
    """Convolve one new token per row, given the J inputs before it, then apply SiLU.

    Returns: `[R, C]` in float32 (float64 for float64 inputs). Keeping `x` for the next step is the caller's part.
    """
    num_rows, num_channels = x_RC.shape
    check_shape("weight", weight_CW, (num_channels, None))
    check_shape("tails", tails_RJC, (num_rows, weight_CW.shape[1] - 1, num_channels))
    dtype = accumulation_dtype(x_RC)
    taps = weight_CW.to(dtype).t()
    before = (tails_RJC.to(dtype) * taps[:-1]).sum(dim=1)
    return F.silu(torch.addcmul(before, x_RC.to(dtype), taps[-1]))
