"""Low-rank adaptation in plain torch.

Legend: `T` tokens, `I` inputs, `O` outputs, `r` rank.

Paper: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import check_shape


def lora_delta(x_TI: torch.Tensor, a_rI: torch.Tensor, b_Or: torch.Tensor, scale: float) -> torch.Tensor:
    """What one adapter adds to a linear layer: `scale * (x A^T) B^T`, in the adapter's format."""
    rank, num_inputs = a_rI.shape
    check_shape("lora_B", b_Or, (None, rank))
    check_shape("x", x_TI, (None, num_inputs))
    return F.linear(F.linear(x_TI.to(a_rI.dtype), a_rI) * scale, b_Or)
