"""The gated activation of a feed-forward layer in plain torch.

Paper: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, in the format of `gate_TF`."""
    return F.silu(gate_TF) * up_TF
