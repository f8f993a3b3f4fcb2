"""What the gated delta rule is fed: heads cut from the convolution's output, and the two gates.

Legend: `T` tokens, `C` convolution channels (q|k|v side by side), `h` key heads, `H` value
heads, `K`/`V` key and value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype
from kiln_nn.kernels.rms_norm import l2_normalise


def delta_rule_heads(
    convolved_TC: torch.Tensor, num_key_heads: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut q, k `[T, h, K]` and v `[T, H, V]`; q and k of unit length, q scaled by `K^-0.5`."""
    rows = convolved_TC.to(accumulation_dtype(convolved_TC))
    num_pair_channels = 2 * num_key_heads * key_dim
    pairs, v = rows.split((num_pair_channels, rows.shape[1] - num_pair_channels), dim=-1)
    q, k = l2_normalise(pairs.reshape(-1, 2, num_key_heads, key_dim)).unbind(1)
    return q * key_dim**-0.5, k, v.reshape(rows.shape[0], -1, value_dim)


def delta_rule_gates(
    a_TH: torch.Tensor, b_TH: torch.Tensor, A_log_H: torch.Tensor, dt_bias_H: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decay `g = -exp(A_log) softplus(a + dt_bias)` and write strength `beta = sigmoid(b)`."""
    dtype = accumulation_dtype(a_TH)
    g = -A_log_H.to(dtype).exp() * F.softplus(a_TH.to(dtype) + dt_bias_H.to(dtype))
    return g, torch.sigmoid(b_TH.to(dtype))
