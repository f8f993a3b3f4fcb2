"""Full attention with query/key norms, partial rotary embedding and an output gate.

Legend: `T` tokens, `H` query heads, `h` kv heads, `D` head width, `E` rotated width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kiln_nn.blocks.linear import LinearFn, Weights
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.qk_norm_rope import qk_norm_rope


class AttentionInputs(NamedTuple):
    """Normed and rotated queries and keys, values, and the output gate before its sigmoid."""

    q_THD: torch.Tensor
    k_ThD: torch.Tensor
    v_ThD: torch.Tensor
    gate_THD: torch.Tensor


def project_attention(
    config: ModelConfig,
    weights: Weights,
    prefix: str,
    x_TD: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    linear: LinearFn,
) -> AttentionInputs:
    """Everything before attention itself, whose scores are scaled by `D ** -0.5`.

    `x_TD` is the layer's input after `input_norm`; `cos_TE`, `sin_TE` come from
    `rotary_tables` for the tokens' positions. `k` and `v` are what the cache keeps.
    """
    num_tokens, path = x_TD.shape[0], f"{prefix}.self_attn"
    # q_proj's rows lie head by head as [query | gate].
    names = (f"{path}.q_proj", f"{path}.k_proj", f"{path}.v_proj")
    q_and_gate, k, v = (rows.view(num_tokens, -1, config.head_dim) for rows in linear(names, x_TD))
    q, gate = q_and_gate.unflatten(1, (-1, 2)).unbind(2)
    q, k = (
        qk_norm_rope(x, weights[f"{path}.{name}.weight"], config.rms_norm_eps, cos_TE, sin_TE)
        for name, x in (("q_norm", q), ("k_norm", k))
    )
    return AttentionInputs(q, k, v, gate)


def finish_attention(
    prefix: str, out_THD: torch.Tensor, gate_THD: torch.Tensor, linear: LinearFn
) -> torch.Tensor:
    """Gate the attention's output and project it back, `[T, hidden]`."""
    gated = out_THD * torch.sigmoid(gate_THD)
    (out,) = linear((f"{prefix}.self_attn.o_proj",), gated.flatten(1))
    return out
