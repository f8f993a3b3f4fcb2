"""A second, quantised copy of the head, which steps of few rows read instead of the whole one.

At batch 1 the head is two fifths of what a model of four-bit weights reads. Embeddings, the trainer and
large steps keep the whole matrix: it is in memory anyway, and what many rows share need not be small.

Legend: `V` vocabulary, `D` hidden width.
"""

from __future__ import annotations

from typing import Literal

import torch

from kiln_nn.kernels.quantised import QuantisedMatrix, Scheme, quantise_rtn

MOST_ROWS = 128  # of a step that reads the copy
_ROWS_AT_ONCE = 8192  # of the vocabulary, so that rounding needs little memory


def make_small_head(head_VD: torch.Tensor, scheme: Scheme | Literal["none"]) -> QuantisedMatrix | None:
    """The head rounded to nearest, if a scheme is wanted.

    Raises:
        ShapeMismatch: the hidden width is not whole groups of a four-bit format.
    """
    if scheme == "none":
        return None
    parts = [quantise_rtn(rows, scheme) for rows in head_VD.split(_ROWS_AT_ONCE)]
    # Concatenated as bytes, which every device can do.
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
    scales = torch.cat([part.scales for part in parts])
    if head_VD.is_cuda:
        del parts
        torch.cuda.empty_cache()  # as large again; the pools are cut from what is free
    return QuantisedMatrix(scheme, values, scales)
