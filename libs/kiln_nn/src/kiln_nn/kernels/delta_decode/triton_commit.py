"""Committing the full pages of all layers in one Triton launch, after a step's last layer.

Source: as triton.py. A row whose page is full writes 32 times what the others write. Inside a
layer's step its programs would be the slowest of the launch by far, and everybody behind it would
wait for them in every layer; together at the end they are one stream of memory.

A program finds the rows to commit by itself, takes every Z-th of them, and of these a block of one
head's state in one layer and a share of the convolution's tail. Supported: what triton.py
supports, with at most 4,096 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.memory import DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton_parts import fold_block
from kiln_nn.kernels.dispatch import is_interpreted

MOST_ROWS = 4096


@dataclass(frozen=True)
class CommitConfig:
    """Format of the products, rows of the state in a program, warps."""

    form: str
    block_k: int
    num_warps: int = 4


# By the format of the committed state.
CONFIGS = {torch.bfloat16: CommitConfig("bf16x3", 64), torch.float32: CommitConfig("tf32x3", 64)}


@triton.jit(do_not_specialize=["num_rows"])
def delta_commit_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows,
    read_slots, ring_slots, lengths, commit_slots,
    state_layer, k_layer, u_layer, log_decay_layer, conv_layer, num_rows,
    ROWS: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, ENTRIES: tl.constexpr, J: tl.constexpr,
    BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H * K / BLOCK_K, L, Z)."""
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    commits = tl.load(commit_slots + row, mask=row < num_rows, other=-1) >= 0
    rank = tl.cumsum(commits.to(tl.int32), 0)
    num_commits = tl.sum(commits.to(tl.int32), 0)
    head = block // (K // BLOCK_K)
    first = block % (K // BLOCK_K) * BLOCK_K
    channels = block * SHARE + tl.arange(0, SHARE)
    state += layer * state_layer
    ring_k += layer * k_layer
    ring_u += layer * u_layer
    ring_log_decay += layer * log_decay_layer
    conv_rows += layer * conv_layer + channels
    for number in range(tl.program_id(2), num_commits, tl.num_programs(2)):
        chosen = tl.sum(tl.where(commits & (rank == number + 1), row, 0), 0)
        read_slot = tl.load(read_slots + chosen).to(tl.int64)
        ring_slot = tl.load(ring_slots + chosen).to(tl.int64)
        commit_slot = tl.load(commit_slots + chosen).to(tl.int64)
        length = tl.load(lengths + chosen).to(tl.int64)
        for tap in tl.static_range(J):
            tail = tl.load(conv_rows + (ring_slot * (J + P) + length + 1 + tap) * C, mask=channels < C)
            tl.store(conv_rows + (commit_slot * (J + P) + tap) * C, tail, mask=channels < C)
        fold_block(
            state + (read_slot * H + head) * (K * V), state + (commit_slot * H + head) * (K * V),
            ring_k + (ring_slot * HK + head // (H // HK)) * (P * K),
            ring_u + (ring_slot * H + head) * (P * V), ring_log_decay + (ring_slot * H + head) * P,
            length + 1, first, K, V, ENTRIES, BLOCK_K, FORM,
        )  # fmt: skip


def delta_commit(layers: DeltaMemory, rows: DeltaRows, config: CommitConfig | None = None) -> None:
    """One launch; the arguments are those of the package's public function and within its envelope."""
    num_layers, _, num_heads, key_dim, value_dim = layers.state_SHKV.shape
    num_key_heads, capacity = layers.ring.k_RhPK.shape[2:4]
    num_channels = layers.conv_rows_SQC.shape[3]
    config = config or CONFIGS[layers.state_SHKV.dtype]
    if rows.num_rows == 0:
        return
    block_k = min(config.block_k, key_dim)
    num_blocks = num_heads * (key_dim // block_k)
    # Rows of a batch tend to stand at every place of a page.
    num_turns = triton.cdiv(rows.num_rows, layers.page_tokens)
    stored = (
        layers.state_SHKV,
        layers.ring.k_RhPK,
        layers.ring.u_RHPV,
        layers.ring.log_decay_RHP,
        layers.conv_rows_SQC,
    )
    delta_commit_kernel[(num_blocks, num_layers, num_turns)](
        *stored,
        rows.read_slots_R,
        rows.ring_slots_R,
        rows.lengths_R,
        rows.commit_slots_R,
        *(tensor.stride(0) for tensor in stored),
        rows.num_rows,
        ROWS=max(16, triton.next_power_of_2(rows.num_rows)),
        H=num_heads,
        HK=num_key_heads,
        K=key_dim,
        V=value_dim,
        C=num_channels,
        SHARE=triton.next_power_of_2(triton.cdiv(num_channels, num_blocks)),
        P=capacity,
        ENTRIES=max(16, triton.next_power_of_2(layers.page_tokens)),
        J=layers.conv_rows_SQC.shape[2] - capacity,
        BLOCK_K=block_k,
        # The interpreter knows no bf16x3, and computes all products in float32.
        FORM="ieee" if is_interpreted() else config.form,
        num_warps=config.num_warps,
    )
