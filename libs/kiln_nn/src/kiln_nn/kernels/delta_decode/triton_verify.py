"""Several new tokens per row of a DeltaNet layer in two Triton launches, behind one that folds full pages.

Source: as triton.py; the new tokens' corrections are the triangular system of Yang et al. 2024
(arXiv 2412.06464, section 3), of eight tokens at most, solved in turn.

Supported: what triton.py supports, with at most eight new tokens per row.

Error of the output against the float64 reference (relative, norm-wise): 3e-7 with a float32 state in
the interpreter; with a bfloat16 one the rounding of the states alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kiln_nn.kernels.delta_decode.memory import DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton_fold import delta_fold
from kiln_nn.kernels.delta_decode.triton_verify_step import verify_keys_kernel, verify_values_kernel
from kiln_nn.kernels.dependent_launch import launch_options, supports_dependent_launch
from kiln_nn.kernels.dispatch import is_interpreted

MOST_NEW_TOKENS = 8


@dataclass(frozen=True)
class VerifyConfig:
    """How the programs compute."""

    # Rows of the state a program reads at a time; one copy less than stages is in flight.
    block_k: int
    num_stages: int
    dot_form: str
    num_warps: int = 4
    num_key_warps: int = 2
    # Ask for the state before the launch before has ended, with so many rows at the most.
    most_prefetched_rows: int = 16


# By the format of the committed state.
CONFIGS = {
    torch.bfloat16: VerifyConfig(block_k=64, num_stages=2, dot_form="bf16x3"),
    torch.float32: VerifyConfig(block_k=32, num_stages=3, dot_form="tf32x3"),
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
    *,
    folds: bool = True,
) -> torch.Tensor:
    """Two launches, and one before that folds; the arguments are those of the package's public function.

    They must be within `triton.supports` and `MOST_NEW_TOKENS`.
    """
    num_slots, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    num_rows, num_new_tokens, device = rows.num_rows, mixed_RNC.shape[1], z_RNHV.device
    config = config or CONFIGS[memory.state_SHKV.dtype]
    out_RNHV = torch.empty(z_RNHV.shape, dtype=z_RNHV.dtype, device=device)
    if num_rows == 0:
        return out_RNHV
    if folds:
        delta_fold(memory.as_layers(), rows)
    # Behind a fold a row has less than a page in its ring.
    num_entries = max(16, triton.next_power_of_2(memory.page_tokens))
    num_tile_tokens = 4 if num_new_tokens <= 4 else MOST_NEW_TOKENS
    # A bf16 state meets keys and queries as two bf16 numbers each.
    is_split = memory.state_SHKV.dtype is torch.bfloat16
    halves, pair_dtype = ((2,), torch.bfloat16) if is_split else ((), torch.float32)
    tiles = (num_rows, num_key_heads, *halves, 2 * num_tile_tokens)
    pairs = torch.empty((*tiles, key_dim), dtype=pair_dtype, device=device)
    dots = torch.empty((*tiles[:2], tiles[-1], num_entries + num_tile_tokens), device=device)
    values = torch.empty((num_rows, num_new_tokens, num_heads, value_dim), device=device)
    dependent = launch_options(supports_dependent_launch(device))
    where = (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R, num_new_R)
    shared = {
        "H": num_heads,
        "HK": num_key_heads,
        "K": key_dim,
        "V": value_dim,
        "P": capacity,
        "PAGE": memory.page_tokens,
        "ENTRIES": num_entries,
        "NEW": num_new_tokens,
        "L": num_tile_tokens,
        "SPLIT": is_split,
        # The interpreter knows no bf16x3, and computes all products in float32.
        "DOT_FORM": "ieee" if is_interpreted() else config.dot_form,
        "MOST_PREFETCHED": config.most_prefetched_rows,
        **dependent,
    }
    verify_keys_kernel[(num_key_heads + num_heads, num_rows)](
        memory.ring.k_RhPK,
        memory.conv_rows_SQC,
        *where,
        mixed_RNC,
        weights.conv_CW,
        pairs,
        dots,
        values,
        *mixed_RNC.stride()[:2],
        num_slots,
        W=weights.conv_CW.shape[1],
        num_warps=config.num_key_warps,
        **shared,
    )
    verify_values_kernel[(num_heads, num_rows)](
        memory.state_SHKV,
        memory.ring.u_RHPV,
        memory.ring.log_decay_RHP,
        *where,
        a_RNH,
        b_RNH,
        z_RNHV,
        weights.A_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        pairs,
        dots,
        values,
        out_RNHV,
        *(stride for x in (a_RNH, b_RNH, z_RNHV) for stride in x.stride()[:2]),
        num_slots,
        weights.norm_eps,
        BLOCK_K=min(config.block_k, key_dim),
        STAGES=config.num_stages,
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=1,
        **shared,
    )
    return out_RNHV
