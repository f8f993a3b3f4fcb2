"""Query or key norm and rotary embedding in plain torch.

Legend: `T` tokens, `H` heads, `D` head width, `E` rotated width.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.rms_norm import reference
from kiln_nn.kernels.rotary import apply_rotary


def qk_norm_rope(
    x_THD: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TE: torch.Tensor, sin_TE: torch.Tensor
) -> torch.Tensor:
    """See the package's public function."""
    return apply_rotary(reference.rms_norm(x_THD, weight_D, eps, offset=1.0), cos_TE, sin_TE)
