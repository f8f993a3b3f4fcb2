"""Folding the full pages of all layers in one Triton launch, before a step of several new tokens.

Source: as triton.py. As triton_commit.py it keeps the rows that write whole states out of the layers'
own launches. There may be tokens behind the boundary: they move to the front of their ring. So one
program takes a key head with its value heads in one layer, and every Z-th of the rows that fold:
nothing it reads is written by another.

Supported: what triton.py supports, with at most 4,096 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.memory import DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton_commit import CONFIGS, CommitConfig
from kiln_nn.kernels.delta_decode.triton_parts import fold_block
from kiln_nn.kernels.dispatch import is_interpreted

# With a draft or two accepted in each step, about so many rows have one that folds.
_ROWS_OF_A_FOLD = 4


@triton.jit
def _move(source, target, stride, columns, num_lines, LINES: tl.constexpr):
    """Lines of `columns` go to the front; both places may be in the same memory."""
    line = tl.arange(0, LINES)
    places = line[:, None] * stride + columns[None, :]
    is_moved = (line < num_lines)[:, None]
    moved = tl.load(source + places, mask=is_moved, other=0.0)
    tl.debug_barrier()
    tl.store(target + places, moved, mask=is_moved)


@triton.jit(do_not_specialize=["num_rows"])
def delta_fold_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows,
    read_slots, ring_slots, lengths, commit_slots,
    state_layer, k_layer, u_layer, log_decay_layer, conv_layer, num_rows,
    ROWS: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr, LINES: tl.constexpr, J: tl.constexpr,
    BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (HK, L, Z). LINES is at least J and what a ring holds beyond a page."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    folds = tl.load(commit_slots + row, mask=row < num_rows, other=-1) >= 0
    rank = tl.cumsum(folds.to(tl.int32), 0)
    num_folds = tl.sum(folds.to(tl.int32), 0)
    line = tl.arange(0, LINES)
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    state += layer * state_layer
    ring_k += layer * k_layer
    ring_u += layer * u_layer
    ring_log_decay += layer * log_decay_layer
    conv_rows += layer * conv_layer
    for number in range(tl.program_id(2), num_folds, tl.num_programs(2)):
        chosen = tl.sum(tl.where(folds & (rank == number + 1), row, 0), 0)
        read_slot = tl.load(read_slots + chosen).to(tl.int64)
        ring_slot = tl.load(ring_slots + chosen).to(tl.int64)
        commit_slot = tl.load(commit_slots + chosen).to(tl.int64)
        num_moved = tl.load(lengths + chosen).to(tl.int64) - PAGE
        keys = ring_k + (ring_slot * HK + key_head) * (P * K)
        old_rows = conv_rows + (ring_slot * (J + P) + PAGE) * C
        new_rows = conv_rows + commit_slot * (J + P) * C
        for member in tl.static_range(GROUP):
            head = key_head * GROUP + member
            source = state + (read_slot * H + head) * (K * V)
            target = state + (commit_slot * H + head) * (K * V)
            u = ring_u + (ring_slot * H + head) * (P * V)
            new_u = ring_u + (commit_slot * H + head) * (P * V)
            log_decays = ring_log_decay + (ring_slot * H + head) * P
            new_log_decays = ring_log_decay + (commit_slot * H + head) * P
            for first in tl.range(0, K, BLOCK_K, num_stages=1, loop_unroll_factor=1):
                fold_block(source, target, keys, u, log_decays, PAGE, first, K, V, ENTRIES, BLOCK_K, FORM)
            _move(u + PAGE * V, new_u, V, value, num_moved, LINES)
            # The sums of log-decays begin anew at the boundary.
            left = tl.load(log_decays + PAGE + line, mask=line < num_moved, other=0.0)
            left -= tl.load(log_decays + PAGE - 1)
            tl.debug_barrier()
            tl.store(new_log_decays + line, left, mask=line < num_moved)
            _move(old_rows, new_rows, C, 2 * HK * K + head * V + value, J + num_moved, 2 * LINES)
        _move(keys + PAGE * K, ring_k + (commit_slot * HK + key_head) * (P * K), K, key, num_moved, LINES)
        for part in tl.static_range(2):
            channels = part * (HK * K) + key_head * K + key
            _move(old_rows, new_rows, C, channels, J + num_moved, 2 * LINES)


def delta_fold(layers: DeltaMemory, rows: DeltaRows, config: CommitConfig | None = None) -> None:
    """One launch; the arguments are those of the package's public function and within its envelope."""
    num_layers, _, num_heads, key_dim, value_dim = layers.state_SHKV.shape
    num_key_heads, capacity = layers.ring.k_RhPK.shape[2:4]
    num_tail_rows = layers.conv_rows_SQC.shape[2] - capacity
    config = config or CONFIGS[layers.state_SHKV.dtype]
    if rows.num_rows == 0:
        return
    stored = (
        layers.state_SHKV,
        layers.ring.k_RhPK,
        layers.ring.u_RHPV,
        layers.ring.log_decay_RHP,
        layers.conv_rows_SQC,
    )
    delta_fold_kernel[(num_key_heads, num_layers, triton.cdiv(rows.num_rows, _ROWS_OF_A_FOLD))](
        *stored,
        rows.read_slots_R,
        rows.ring_slots_R,
        rows.lengths_R,
        rows.commit_slots_R,
        *(tensor.stride(0) for tensor in stored),
        rows.num_rows,
        ROWS=max(64, triton.next_power_of_2(rows.num_rows)),
        H=num_heads,
        HK=num_key_heads,
        K=key_dim,
        V=value_dim,
        P=capacity,
        PAGE=layers.page_tokens,
        ENTRIES=max(16, triton.next_power_of_2(layers.page_tokens)),
        LINES=triton.next_power_of_2(max(num_tail_rows, capacity - layers.page_tokens, 1)),
        J=num_tail_rows,
        BLOCK_K=min(config.block_k, key_dim),
        # The interpreter knows no bf16x3, and computes all products in float32.
        FORM="ieee" if is_interpreted() else config.form,
        num_warps=config.num_warps,
    )
