"""Device code for several new tokens per row; `triton_verify.py` launches it.

One program takes one row and one key head, with all value heads that share it: then nothing it
reads is written by another, though a fold moves what lies in the ring. New tokens stand in 16-row
tiles: keys in lines 0 to 7, queries in lines 8 to 15. What they read of the state and of the ring
is one product each; among themselves they are taken in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import prefetch_lines, silu, softplus
from kiln_nn.kernels.dependent_launch import start_dependents, wait_for_producers


@triton.jit
def _convolve_new(
    mixed, token_stride, conv_rows, conv_weight, channels, new, live, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU: line r of `channels` [16, width] belongs to new token `new[r]`."""
    J: tl.constexpr = W - 1
    y = tl.zeros(channels.shape, tl.float32)
    for tap in tl.static_range(W):
        place = new + tap - J  # among the new tokens; below 0 it was there before
        is_new = (place >= 0)[:, None] & live[:, None]
        is_old = (place < 0)[:, None] & live[:, None]
        stored = length + J + place
        slot = tl.where(stored < J, read_slot, ring_slot)
        own = tl.load(mixed + place[:, None] * token_stride + channels, mask=is_new, other=0.0)
        old = tl.load(conv_rows + (slot * (J + P) + stored)[:, None] * C + channels, mask=is_old, other=0.0)
        taps = tl.load(conv_weight + channels * W + tap).to(tl.float32)
        y += (own.to(tl.float32) + old.to(tl.float32)) * taps
    return silu(y)


@triton.jit
def _keep_new_rows(
    mixed, token_stride, conv_rows, channels, ring_slot, write_slot, num_moved, begin, num_new, is_fold,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Append the tokens' channels; on a fold the tail and the rows behind the boundary move first."""
    J: tl.constexpr = W - 1
    line = tl.arange(0, 16)
    is_kept = ((line < J + num_moved) & is_fold)[:, None]
    is_new = (line < num_new)[:, None]
    columns = channels[None, :]
    kept = tl.load(
        conv_rows + (ring_slot * (J + P) + PAGE + line)[:, None] * C + columns, mask=is_kept, other=0.0
    )
    new = tl.load(mixed + line[:, None] * token_stride + columns, mask=is_new, other=0.0)
    tl.debug_barrier()
    first = write_slot * (J + P)
    tl.store(conv_rows + (first + line)[:, None] * C + columns, kept, mask=is_kept)
    new = new.to(conv_rows.dtype.element_ty)
    tl.store(conv_rows + (first + J + begin + line)[:, None] * C + columns, new, mask=is_new)


@triton.jit
def _keep_values(
    u_source, u_target, u, decay_source, decay_target, log_decay, boundary, is_moved, is_kept, begin,
    V: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write one head's new u and log-decays; on a fold what is behind the boundary moves first."""
    line = tl.arange(0, 16)
    value = tl.arange(0, V)[None, :]
    u_moved = tl.load(u_source + (PAGE + line)[:, None] * V + value, mask=is_moved[:, None], other=0.0)
    decays_moved = tl.load(decay_source + PAGE + line, mask=is_moved, other=0.0) - boundary
    tl.debug_barrier()
    tl.store(u_target + line[:, None] * V + value, u_moved, mask=is_moved[:, None])
    u = u.to(u_target.dtype.element_ty)
    tl.store(u_target + (begin + line)[:, None] * V + value, u, mask=is_kept[:, None])
    tl.store(decay_target + line, decays_moved, mask=is_moved)
    tl.store(decay_target + begin + line, log_decay - boundary, mask=is_kept)


@triton.jit
def _read_states(
    state_head, pair,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    DOT_FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`pair S`, [16, V] in float32; a bf16 state meets the pair as two bf16 numbers."""
    both = tl.zeros((16, V), tl.float32)
    value = tl.arange(0, V)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_K)
        block = tl.load(state_head + row[:, None] * V + value[None, :])
        part = tl.gather(pair, tl.broadcast_to(row[None, :], (16, BLOCK_K)), 1)
        if INTERPRETED or state_head.dtype.element_ty != tl.bfloat16:
            both = tl.dot(part, block.to(tl.float32), both, input_precision=DOT_FORM)
        else:
            high = part.to(tl.bfloat16)
            both = tl.dot(high, block, both)
            both = tl.dot((part - high.to(tl.float32)).to(tl.bfloat16), block, both)
    return both


@triton.jit
def _fold_state(
    source, target, ring_k_base, u_weighted, entries, decay,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FORM: tl.constexpr,
):  # fmt: skip
    """`S <- decay S + sum_i k_i u_i^T` over a ring's first page; the weights are in `u_weighted`."""
    value = tl.arange(0, V)
    for first in tl.range(0, K, BLOCK_K, num_stages=1, loop_unroll_factor=1):
        row = first + tl.arange(0, BLOCK_K)
        keys = tl.load(
            ring_k_base + entries[None, :] * K + row[:, None], mask=(entries < PAGE)[None, :], other=0.0
        ).to(tl.float32)
        places = row[:, None] * V + value[None, :]
        old = tl.load(source + places).to(tl.float32)
        new = decay * old + tl.dot(keys, u_weighted, input_precision=DOT_FORM)
        tl.store(target + places, new.to(target.dtype.element_ty))


@triton.jit
def _in_turn(acc, v, beta, weight, num_new, line, V: tl.constexpr):
    """Correct the tokens' values one after the other: `(outputs in lines 8.., u in lines 0..)`.

    `acc` is what they read of the state and the ring, `weight` [16, 16] what a line takes of
    each new token's u: a key of those before it, a query of its own too.
    """
    u_all = tl.zeros(acc.shape, tl.float32)
    for j in range(num_new):
        is_here = (line == j)[:, None]
        u = tl.sum(tl.where(is_here, beta[:, None] * (v - acc), 0.0), 0)
        taken = tl.sum(tl.where((line == j)[None, :], weight, 0.0), 1)
        acc += taken[:, None] * u[None, :]
        u_all = tl.where(is_here, u[None, :], u_all)
    return acc, u_all


@triton.jit(do_not_specialize=["num_slots"])
def delta_verify_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows,
    read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
    mixed, a, b, z, conv_weight, A_log, dt_bias, norm_weight, out,
    mixed_row, mixed_token, a_row, a_token, b_row, b_token, z_row, z_token,
    num_slots, norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, ENTRIES: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, NEW: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, COMMIT_BLOCK_K: tl.constexpr,
    DOT_FORM: tl.constexpr, COMMIT_FORM: tl.constexpr,
    DEPENDENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (HK, R)."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    row = tl.program_id(1)
    if DEPENDENT:
        start_dependents()
        early_slot = tl.load(read_slots + row, volatile=True).to(tl.int64)
        early_slot = tl.minimum(tl.maximum(early_slot, 0), num_slots - 1)
        for member in tl.static_range(GROUP):
            prefetch_lines(state + (early_slot * H + key_head * GROUP + member) * (K * V), K * V)
        wait_for_producers()
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    read_slot = tl.load(read_slots + row).to(tl.int64)
    commit_slot = tl.load(commit_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)
    num_new = tl.minimum(tl.load(num_new_tokens + row).to(tl.int32), NEW)
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    line = tl.arange(0, 16)
    new = line % 8
    is_key = line < 8
    live = new < num_new
    out_lines = out + ((row * NEW + new) * (H * V))[:, None] + value[None, :]
    is_output = ((line >= 8) & (new < NEW))[:, None]
    if ring_slot < 0:
        for member in tl.static_range(GROUP):
            empty = tl.zeros((16, V), out.dtype.element_ty)
            tl.store(out_lines + (key_head * GROUP + member) * V, empty, mask=is_output)
        return

    is_fold = commit_slot >= 0
    write_slot = tl.where(is_fold, commit_slot, ring_slot)
    begin = tl.where(is_fold, length - PAGE, length)
    num_moved = tl.where(is_fold, length - PAGE, 0)
    used = entries < length
    is_moved = line < num_moved
    mixed += row * mixed_row
    pair_channels = tl.where(is_key, HK * K, 0)[:, None] + key_head * K + key[None, :]
    pair = _convolve_new(
        mixed, mixed_token, conv_rows, conv_weight, pair_channels, new, live, read_slot, ring_slot, length,
        C, P, W,
    )  # fmt: skip
    pair *= tl.rsqrt(tl.sum(pair * pair, 1) + 1e-6)[:, None] * tl.where(is_key, 1.0, K**-0.5)[:, None]
    ring_k_base = ring_k + (ring_slot * HK + key_head) * (P * K)
    k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
    k_moved = tl.load(
        ring_k_base + (PAGE + line)[:, None] * K + key[None, :], mask=is_moved[:, None], other=0.0
    )
    with_ring = tl.dot(pair, tl.trans(k_old.to(tl.float32)), input_precision=DOT_FORM)
    with_new = tl.dot(pair, tl.trans(pair), input_precision=DOT_FORM)
    # A key takes of the tokens before it, a query of its own token too.
    is_taken = is_key[None, :] & (line[None, :] < new[:, None] + tl.where(is_key, 0, 1)[:, None])
    is_before = is_key[None, :] & (line[None, :] <= new[:, None])

    for member in tl.static_range(GROUP):
        head = key_head * GROUP + member
        state_head = state + (read_slot * H + head) * (K * V)
        ring_u_base = ring_u + (ring_slot * H + head) * (P * V)
        log_decay_base = ring_log_decay + (ring_slot * H + head) * P
        u_old = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
        u_old = u_old.to(tl.float32)
        log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
        a_in = tl.load(a + row * a_row + new * a_token + head, mask=live, other=0.0).to(tl.float32)
        b_in = tl.load(b + row * b_row + new * b_token + head, mask=live, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        g = -rate * softplus(a_in + tl.load(dt_bias + head).to(tl.float32))
        beta = 1.0 / (1.0 + tl.exp(-b_in))
        v_channels = 2 * HK * K + head * V + value
        v = _convolve_new(
            mixed, mixed_token, conv_rows, conv_weight, tl.broadcast_to(v_channels[None, :], (16, V)),
            new, live & is_key, read_slot, ring_slot, length, C, P, W,
        )  # fmt: skip

        # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
        log_decay = tl.min(log_decays, 0) + tl.sum(tl.where(is_before, g[None, :], 0.0), 1)
        ring_weight = tl.where(used[None, :], tl.exp(log_decay[:, None] - log_decays[None, :]), 0.0)
        new_weight = tl.where(is_taken, tl.exp(log_decay[:, None] - log_decay[None, :]), 0.0) * with_new
        from_state = _read_states(state_head, pair, K, V, BLOCK_K, STAGES, DOT_FORM, INTERPRETED)
        from_ring = tl.dot(with_ring * ring_weight, u_old, input_precision=DOT_FORM)
        acc = tl.exp(log_decay)[:, None] * from_state + from_ring
        o, u = _in_turn(acc, v, beta, new_weight, num_new, line, V)

        z_in = tl.load(
            z + row * z_row + (new * z_token)[:, None] + head * V + value[None, :],
            mask=is_output & live[:, None],
            other=0.0,
        ).to(tl.float32)
        norm = tl.rsqrt(tl.sum(o * o, 1) / V + norm_eps)[:, None]
        norm *= tl.load(norm_weight + value).to(tl.float32)[None, :]
        # Lines of no token hold a gate of zero.
        tl.store(out_lines + head * V, (o * norm * silu(z_in)).to(out.dtype.element_ty), mask=is_output)

        boundary = tl.where(is_fold, tl.sum(tl.where(entries == PAGE - 1, log_decays, 0.0), 0), 0.0)
        if is_fold:
            weight = tl.where(entries < PAGE, tl.exp(boundary - log_decays), 0.0)
            _fold_state(
                state_head, state + (commit_slot * H + head) * (K * V), ring_k_base,
                u_old * weight[:, None], entries, tl.exp(boundary), K, V, PAGE, COMMIT_BLOCK_K, COMMIT_FORM,
            )  # fmt: skip
        _keep_values(
            ring_u_base, ring_u + (write_slot * H + head) * (P * V), u, log_decay_base,
            ring_log_decay + (write_slot * H + head) * P, log_decay, boundary, is_moved, live & is_key,
            begin, V, PAGE,
        )  # fmt: skip
        _keep_new_rows(
            mixed, mixed_token, conv_rows, v_channels, ring_slot, write_slot, num_moved, begin, num_new,
            is_fold, C, P, W, PAGE,
        )  # fmt: skip

    tl.debug_barrier()
    k_target = ring_k + (write_slot * HK + key_head) * (P * K) + key[None, :]
    tl.store(k_target + line[:, None] * K, k_moved, mask=is_moved[:, None])
    k_kept = pair.to(ring_k.dtype.element_ty)
    tl.store(k_target + (begin + line)[:, None] * K, k_kept, mask=(live & is_key)[:, None])
    for part in tl.static_range(2):
        _keep_new_rows(
            mixed, mixed_token, conv_rows, part * (HK * K) + key_head * K + key, ring_slot, write_slot,
            num_moved, begin, num_new, is_fold, C, P, W, PAGE,
        )  # fmt: skip
