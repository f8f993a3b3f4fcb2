"""The decode step of a DeltaNet layer in Triton: two launches that are written for memory bandwidth, or
one, for few rows, whose loads and sums wait for each other as seldom as they can.

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

from dataclasses import dataclass, replace

import torch
import triton

from kiln_nn.kernels.delta_decode.memory import DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton_commit import delta_commit
from kiln_nn.kernels.delta_decode.triton_few_rows import delta_few_rows_kernel
from kiln_nn.kernels.delta_decode.triton_step import delta_keys_kernel, delta_values_kernel
from kiln_nn.kernels.dependent_launch import launch_options, supports_dependent_launch
from kiln_nn.kernels.dispatch import is_interpreted
from kiln_nn.kernels.quantised import GROUP_INPUTS, RoundedRows, unwritten_groups

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepConfig:
    """How the programs compute."""

    uses_tensor_cores: bool
    # Rows of the state a program reads at a time; one copy less than stages is in flight.
    block_k: int
    num_stages: int
    num_warps: int = 4
    num_key_warps: int = 4
    # On Hopper.
    max_registers: int | None = None
    # Start before the launch before has ended, where the device can, and with so many rows at the most
    # ask for the state already then. With more rows the requests cost more than they hide.
    is_dependent: bool = True
    most_prefetched_rows: int = 8
    # With so many rows at the most one launch does everything (triton_few_rows.py).
    most_rows_at_once: int = 0


# By the format of the committed state.
CONFIGS = {
    torch.bfloat16: StepConfig(True, block_k=64, num_stages=3, num_key_warps=2, most_rows_at_once=8),
    torch.float32: StepConfig(False, block_k=8, num_stages=6, num_warps=1, num_key_warps=2),
}
# With many rows more programs beside each other are worth more than an early start.
_MANY_ROWS = 128
# The one launch holds a row's whole ring beside the state in registers: compiled for Hopper 172 of 255 with
# pages up to 16, as it was timed, 231 with 32 and all 255 with 64.
_MOST_PAGE_TOKENS_AT_ONCE = 16
# Of a program that does everything: with more of them than a state has columns in pieces of four, the
# compiler reads all else several times over.
_WARPS_AT_ONCE = 4
_MANY_ROWS_CONFIG = replace(CONFIGS[torch.bfloat16], num_stages=2, max_registers=72, is_dependent=False)


def choose(num_rows: int, state_dtype: torch.dtype, page_tokens: int) -> StepConfig:
    """The measured choice: for each format of the state, on Hopper for many rows of bf16 states, and two
    launches for pages with which one was not timed."""
    if state_dtype is torch.bfloat16 and num_rows >= _MANY_ROWS:
        return _MANY_ROWS_CONFIG
    if page_tokens > _MOST_PAGE_TOKENS_AT_ONCE:
        return replace(CONFIGS[state_dtype], most_rows_at_once=0)
    return CONFIGS[state_dtype]


def invariant_config(state_dtype: torch.dtype) -> StepConfig:
    """The one configuration for every number of rows."""
    return replace(CONFIGS[state_dtype], most_prefetched_rows=0, most_rows_at_once=0)


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
    rounds: bool = False,
    reads_early: bool = False,
) -> torch.Tensor | RoundedRows:
    """One launch or two, and one that commits; the arguments are the package's and within `supports`."""
    num_rows = rows.num_rows
    config = config or choose(num_rows, memory.state_SHKV.dtype, memory.page_tokens)
    out_RHV = torch.empty(z_RHV.shape, dtype=z_RHV.dtype, device=z_RHV.device)
    if num_rows == 0:
        return out_RHV
    tokens = (mixed_RC, a_RH, b_RH, z_RHV)
    rounded = None
    if num_rows <= config.most_rows_at_once:
        _at_once(memory, rows, weights, *tokens, out_RHV, config, reads_early=reads_early)
    else:
        if rounds and out_RHV.shape[2] == GROUP_INPUTS:
            rounded = unwritten_groups(out_RHV.flatten(1))
        _in_two_launches(memory, rows, weights, *tokens, out_RHV, rounded, config)
    if commits:
        delta_commit(memory.as_layers(), rows)
    return out_RHV if rounded is None else rounded


def _sizes(memory: DeltaMemory) -> dict[str, int]:
    """What all kernels of a step are compiled for."""
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    return {
        "H": num_heads,
        "HK": num_key_heads,
        "K": key_dim,
        "V": value_dim,
        "P": capacity,
        # A row that decodes has less than a page in its ring, whatever room that has for drafts.
        "ENTRIES": max(16, triton.next_power_of_2(memory.page_tokens)),
    }


def _at_once(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
    out_RHV: torch.Tensor,
    config: StepConfig,
    *,
    reads_early: bool,
) -> None:
    sizes = _sizes(memory)
    delta_few_rows_kernel[(sizes["H"], rows.num_rows)](
        memory.state_SHKV,
        memory.ring.k_RhPK,
        memory.ring.u_RHPV,
        memory.ring.log_decay_RHP,
        memory.conv_rows_SQC,
        rows.read_slots_R,
        rows.ring_slots_R,
        rows.lengths_R,
        mixed_RC,
        a_RH,
        b_RH,
        z_RHV,
        weights.conv_CW,
        weights.A_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        out_RHV,
        mixed_RC.stride(0),
        a_RH.stride(0),
        b_RH.stride(0),
        z_RHV.stride(0),
        weights.norm_eps,
        W=weights.conv_CW.shape[1],
        EARLY=reads_early,
        INTERPRETED=is_interpreted(),
        num_warps=_WARPS_AT_ONCE,
        **sizes,
        **launch_options(config.is_dependent and supports_dependent_launch(z_RHV.device)),
    )


def _in_two_launches(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
    out_RHV: torch.Tensor,
    rounded: RoundedRows | None,
    config: StepConfig,
) -> None:
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, device = memory.ring.k_RhPK.shape[1], z_RHV.device
    num_rows, num_entries = rows.num_rows, _sizes(memory)["ENTRIES"]
    pairs = torch.empty(
        (num_rows, num_key_heads, 4 if config.uses_tensor_cores else 2, key_dim),
        dtype=torch.bfloat16 if config.uses_tensor_cores else torch.float32,
        device=device,
    )
    dots = torch.empty((num_rows, num_key_heads, 2, num_entries), device=device)
    values = torch.empty((num_rows, num_heads, value_dim), device=device)
    dependent = launch_options(config.is_dependent and supports_dependent_launch(device))
    where = (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R)
    sizes = {**_sizes(memory), "PREFETCH": num_rows <= config.most_prefetched_rows}
    delta_keys_kernel[(2 * num_key_heads, num_rows)](
        memory.ring.k_RhPK,
        memory.conv_rows_SQC,
        *where,
        mixed_RC,
        weights.conv_CW,
        pairs,
        dots,
        values,
        mixed_RC.stride(0),
        memory.state_SHKV.shape[0],
        W=weights.conv_CW.shape[1],
        SPLIT=config.uses_tensor_cores,
        num_warps=config.num_key_warps,
        **sizes,
        **dependent,
    )
    delta_values_kernel[(num_heads, num_rows)](
        memory.state_SHKV,
        memory.ring.u_RHPV,
        memory.ring.log_decay_RHP,
        *where,
        a_RH,
        b_RH,
        z_RHV,
        weights.A_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        pairs,
        dots,
        values,
        out_RHV,
        out_RHV if rounded is None else rounded.numbers_TI,
        out_RHV if rounded is None else rounded.scales_GT,
        a_RH.stride(0),
        b_RH.stride(0),
        z_RHV.stride(0),
        memory.state_SHKV.shape[0],
        weights.norm_eps,
        BLOCK_K=min(config.block_k, key_dim),
        STAGES=config.num_stages,
        USES_TENSOR_CORES=config.uses_tensor_cores,
        ROUNDED=rounded is not None,
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=1,
        # The tensor cores before Hopper's need more registers than the limit.
        maxnreg=config.max_registers if supports_dependent_launch(device) else None,
        **sizes,
        **dependent,
    )
