"""Several new tokens per row of a DeltaNet layer in one Triton launch.

Source: as triton.py, with the new tokens' corrections solved in turn (the triangular system of
Yang et al. 2024, arXiv 2412.06464, section 3, of eight tokens at most).

Supported: what triton.py supports, with at most eight new tokens per row.

Error of the output against the float64 reference (relative, norm-wise): 3e-7 with a float32 state in
the interpreter; with a bfloat16 one the rounding of the states alone. On a fold the new tokens
read the state before it and the whole ring, so they are spared its rounding once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kiln_nn.kernels.delta_decode.before_verify_step import delta_verify_kernel
from kiln_nn.kernels.delta_decode.memory import DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.dependent_launch import launch_options, supports_dependent_launch
from kiln_nn.kernels.dispatch import is_interpreted

MOST_NEW_TOKENS = 8


@dataclass(frozen=True)
class VerifyConfig:
    """How a program computes: tensor-core formats, rows of the state at a time, copies in flight."""

    commit_form: str
    block_k: int
    num_stages: int
    commit_block_k: int
    dot_form: str = "tf32x3"
    num_warps: int = 4


# By the format of the committed state.
CONFIGS = {
    torch.bfloat16: VerifyConfig("bf16x3", block_k=64, num_stages=3, commit_block_k=32),
    torch.float32: VerifyConfig("tf32x3", block_k=32, num_stages=3, commit_block_k=16),
}


def delta_verify(
    memory: DeltaMemory,
    rows: DeltaRows,
    num_new_R: torch.Tensor,
    weights: DeltaDecodeWeights,
    mixed_RNC: torch.Tensor,
    a_RNH: torch.Tensor,
    b_RNH: torch.Tensor,
    z_RNHV: torch.Tensor,
    config: VerifyConfig | None = None,
) -> torch.Tensor:
    """One launch; the arguments are those of the package's public function.

    They must be within `triton.supports` and `MOST_NEW_TOKENS`.
    """
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    config = config or CONFIGS[memory.state_SHKV.dtype]
    out_RNHV = torch.empty(z_RNHV.shape, dtype=z_RNHV.dtype, device=z_RNHV.device)
    if rows.num_rows == 0:
        return out_RNHV
    delta_verify_kernel[(num_key_heads, rows.num_rows)](
        memory.state_SHKV,
        memory.ring.k_RhPK,
        memory.ring.u_RHPV,
        memory.ring.log_decay_RHP,
        memory.conv_rows_SQC,
        rows.read_slots_R,
        rows.ring_slots_R,
        rows.lengths_R,
        rows.commit_slots_R,
        num_new_R,
        mixed_RNC,
        a_RNH,
        b_RNH,
        z_RNHV,
        weights.conv_CW,
        weights.A_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        out_RNHV,
        *(x.stride(d) for x in (mixed_RNC, a_RNH, b_RNH, z_RNHV) for d in (0, 1)),
        memory.state_SHKV.shape[0],
        weights.norm_eps,
        H=num_heads,
        HK=num_key_heads,
        K=key_dim,
        V=value_dim,
        P=capacity,
        ENTRIES=max(16, triton.next_power_of_2(capacity)),
        W=weights.conv_CW.shape[1],
        PAGE=memory.page_tokens,
        NEW=mixed_RNC.shape[1],
        BLOCK_K=min(config.block_k, key_dim),
        STAGES=config.num_stages,
        COMMIT_BLOCK_K=min(config.commit_block_k, key_dim),
        DOT_FORM="ieee" if is_interpreted() else config.dot_form,
        # The interpreter knows no bf16x3, and computes all products in float32.
        COMMIT_FORM="ieee" if is_interpreted() else config.commit_form,
        **launch_options(supports_dependent_launch(mixed_RNC.device)),
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=1,
    )
    return out_RNHV
