"""The decode step of a DeltaNet layer in two Triton launches, written for memory bandwidth.

Source: the page-committed form of gated_delta/ring.py (Yang et al. 2024, arXiv 2412.06464,
unrolled over a page; the same idea is known as ReplaySSM). A step reads the state once and
writes it once a page.

Supported: K and V powers of two from 16 to 128 (the dot needs 16; a head's state must fit one
program), any number of value heads per key head, convolution width 2 to 8, pages of at least
that many tokens (a row that commits no longer convolves over the tail it replaces), ring up to 64
tokens, contiguous memory. State in float32 or bfloat16, ring in float32, the rest in float32,
bfloat16 or float16. Everything else takes the reference.

Error of the output against the float64 reference (relative, norm-wise, after 200 tokens with
commits, on an H200): 2.0e-7 with a float32 state and 2.7e-3 to 3.6e-3 with a bfloat16 one, the draw of
half-lives deciding. benchmarks/kernels/delta_decode.py measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kiln_nn.kernels.delta_decode.memory import DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton_step import delta_keys_kernel, delta_values_kernel
from kiln_nn.kernels.dependent_launch import launch_options, supports_dependent_launch
from kiln_nn.kernels.dispatch import is_interpreted

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepConfig:
    """How the programs compute. The forms are those of `triton_step`."""

    state_form: str
    commit_form: str
    # Rows of the state a program reads at a time; one copy less than stages is in flight.
    block_k: int
    num_stages: int
    # Rows of the state that a commit updates at a time.
    commit_block_k: int
    num_warps: int = 4
    num_key_warps: int = 4
    # On Hopper, without commits.
    max_registers: int | None = None
    # Start before the launch before has ended, where the device can, and with so many rows at the most
    # ask for the state already then. With more rows the requests cost more than they hide.
    is_dependent: bool = True
    most_prefetched_rows: int = 8


# By the format of the committed state: where `delta_commit` follows, and where the step commits itself.
CONFIGS = {
    torch.bfloat16: StepConfig(
        "tall", "bf16x3", block_k=64, num_stages=3, commit_block_k=32, num_key_warps=2
    ),
    torch.float32: StepConfig(
        "fma", "tf32x3", block_k=8, num_stages=6, commit_block_k=16, num_warps=1, num_key_warps=2
    ),
}
COMMITTING_CONFIGS = {
    torch.bfloat16: StepConfig(
        "wide", "bf16x3", block_k=64, num_stages=3, commit_block_k=16, num_warps=2, num_key_warps=2
    ),
    torch.float32: CONFIGS[torch.float32],
}


def supports(
    memory: DeltaMemory,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
) -> bool:
    """Whether shapes, formats and strides are within what the kernel was written for."""
    parameters = (weights.conv_CW, weights.A_log_H, weights.dt_bias_H, weights.norm_V)
    inputs = (mixed_RC, a_RH, b_RH, z_RHV)
    return (
        supports_memory(memory)
        and all(tensor.dtype in _FLOATS for tensor in (*parameters, *inputs))
        and all(tensor.is_contiguous() for tensor in parameters)
        and all(tensor.stride(-1) == 1 for tensor in inputs)
        and z_RHV.stride(1) == memory.state_SHKV.shape[3]
    )


def supports_memory(memory: DeltaMemory) -> bool:
    """Whether one layer's slots are within what the kernels were written for."""
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    conv_width = memory.conv_rows_SQC.shape[1] - capacity + 1
    rings = (memory.ring.k_RhPK, memory.ring.u_RHPV, memory.ring.log_decay_RHP)
    return (
        key_dim in (16, 32, 64, 128)
        and value_dim in (16, 32, 64, 128)
        and num_heads % num_key_heads == 0
        and 2 <= conv_width <= 8
        and conv_width <= memory.page_tokens <= capacity <= 64
        and memory.state_SHKV.dtype in CONFIGS
        and all(ring.dtype is torch.float32 for ring in rings)
        and memory.conv_rows_SQC.dtype in _FLOATS
        and all(x.is_contiguous() for x in (memory.state_SHKV, memory.conv_rows_SQC, *rings))
    )


def delta_decode(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
    config: StepConfig | None = None,
    *,
    commits: bool = True,
) -> torch.Tensor:
    """Two launches; the arguments are those of the package's public function and within `supports`."""
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    config = config or (COMMITTING_CONFIGS if commits else CONFIGS)[memory.state_SHKV.dtype]
    num_rows, device = rows.num_rows, z_RHV.device
    out_RHV = torch.empty(z_RHV.shape, dtype=z_RHV.dtype, device=device)
    if num_rows == 0:
        return out_RHV
    num_entries = max(16, triton.next_power_of_2(capacity))
    is_split = config.state_form != "fma"
    pairs = torch.empty(
        (num_rows, num_key_heads, 4 if is_split else 2, key_dim),
        dtype=torch.bfloat16 if is_split else torch.float32,
        device=device,
    )
    dots = torch.empty((num_rows, num_key_heads, 2, num_entries), device=device)
    is_dependent = config.is_dependent and supports_dependent_launch(device)
    dependent = launch_options(is_dependent)
    # Commits, and the tensor cores before Hopper's, need more registers than the limit.
    has_room = is_dependent and not commits
    where = (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R)
    sizes = {"HK": num_key_heads, "K": key_dim, "P": capacity, "ENTRIES": num_entries}
    sizes["COMMITS"] = commits
    sizes["PREFETCH"] = num_rows <= config.most_prefetched_rows
    sizes["W"] = weights.conv_CW.shape[1]
    delta_keys_kernel[(num_key_heads, num_rows)](
        memory.ring.k_RhPK,
        memory.conv_rows_SQC,
        *where,
        mixed_RC,
        weights.conv_CW,
        pairs,
        dots,
        mixed_RC.stride(0),
        memory.state_SHKV.shape[0],
        C=mixed_RC.shape[1],
        SPLIT=is_split,
        num_warps=config.num_key_warps,
        **sizes,
        **dependent,
    )
    delta_values_kernel[(num_heads, num_rows)](
        memory.state_SHKV,
        memory.ring.k_RhPK,
        memory.ring.u_RHPV,
        memory.ring.log_decay_RHP,
        memory.conv_rows_SQC,
        *where,
        mixed_RC,
        a_RH,
        b_RH,
        z_RHV,
        weights.conv_CW,
        weights.A_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        pairs,
        dots,
        out_RHV,
        mixed_RC.stride(0),
        a_RH.stride(0),
        b_RH.stride(0),
        z_RHV.stride(0),
        memory.state_SHKV.shape[0],
        weights.norm_eps,
        H=num_heads,
        V=value_dim,
        BLOCK_K=min(config.block_k, key_dim),
        STAGES=config.num_stages,
        COMMIT_BLOCK_K=min(config.commit_block_k, key_dim),
        STATE_FORM=config.state_form,
        # The interpreter knows no bf16x3, and computes all products in float32.
        COMMIT_FORM="ieee" if is_interpreted() else config.commit_form,
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=1,
        maxnreg=config.max_registers if has_room else None,
        **sizes,
        **dependent,
    )
    return out_RHV
