"""The decode step's device code; `triton.py` launches it and states what it supports.

Two launches. `delta_keys_kernel` convolves: a program takes q and k of one key head of one row and
multiplies them with the ring's keys, or it takes the values that belong to one. `delta_values_kernel`
takes one value head of one row: the ring's values, then the whole `[K, V]` state. The first is
small; without it every value head would do its share again, and wait for it before the state.

Nothing that another program of the same launch reads is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import convolve, prefetch_lines, silu, softplus, unit
from kiln_nn.kernels.dependent_launch import prefetch_to_l2, start_dependents, wait_for_producers
from kiln_nn.kernels.quantised.triton import e4m3_groups


@triton.jit
def _convolve_and_keep(
    mixed, conv_rows, conv_weight, channels, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """`silu` of the convolution of one token's channels, which are appended to the ring's rows."""
    token = tl.load(mixed + channels)
    y = convolve(token, conv_rows, conv_weight, channels, read_slot, ring_slot, length, C, P, W)
    place = ring_slot * (W - 1 + P) + W - 1 + length
    tl.store(conv_rows + place * C + channels, token.to(conv_rows.dtype.element_ty))
    return silu(y)


@triton.jit
def _early_slots(read_slots, ring_slots, lengths, row, num_slots, P: tl.constexpr):
    """A row's numbers before the producers have ended, bent into range.

    Where a producer is about to write them, the wrong lines come to the cache, and no more.
    """
    read_slot = tl.load(read_slots + row, volatile=True).to(tl.int64)
    ring_slot = tl.load(ring_slots + row, volatile=True).to(tl.int64)
    length = tl.load(lengths + row, volatile=True).to(tl.int32)
    read_slot = tl.minimum(tl.maximum(read_slot, 0), num_slots - 1)
    ring_slot = tl.minimum(tl.maximum(ring_slot, 0), num_slots - 1)
    return read_slot, ring_slot, tl.minimum(tl.maximum(length, 0), P)


@triton.jit(do_not_specialize=["num_slots"])
def delta_keys_kernel(
    ring_k, conv_rows, read_slots, ring_slots, lengths, mixed, conv_weight, pairs, dots, values,
    mixed_stride, num_slots,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRIES: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (2 HK, R): the keys' programs, then those that only convolve values.

    `pairs` [R, HK, 2, K] float32 has k and q; with SPLIT [R, HK, 4, K] bfloat16 has their upper and
    their lower halves. `dots` [R, HK, 2, ENTRIES] has their products with the ring's keys, and at
    the query's place `length` its product with this token's key. `values` [R, H, V] float32 has v.
    """
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    program = tl.program_id(0)
    row = tl.program_id(1)
    key_head = program % HK
    key = tl.arange(0, K)
    entries = tl.arange(0, ENTRIES)
    if DEPENDENT:
        start_dependents()
        if PREFETCH:
            _, early_ring, early_length = _early_slots(read_slots, ring_slots, lengths, row, num_slots, P)
            early_keys = ring_k + (early_ring * HK + key_head) * (P * K) + entries * K
            wanted = (entries < early_length) & (program < HK)
            prefetch_to_l2(early_keys, tl.where(wanted, K * 4, 0))
        wait_for_producers()
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    read_slot = tl.load(read_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)
    if ring_slot < 0:
        return

    mixed += row * mixed_stride
    if program >= HK:
        value = tl.arange(0, V)
        for number in tl.static_range(GROUP):
            head = key_head * GROUP + number
            channels = 2 * HK * K + head * V + value
            v = _convolve_and_keep(
                mixed, conv_rows, conv_weight, channels, read_slot, ring_slot, length, C, P, W
            )
            tl.store(values + (row * H + head) * V + value, v)
    else:
        used = entries < length
        ring_k_base = ring_k + (ring_slot * HK + key_head) * (P * K)
        k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
        q_channels = key_head * K + key
        k_channels = HK * K + q_channels
        q = _convolve_and_keep(
            mixed, conv_rows, conv_weight, q_channels, read_slot, ring_slot, length, C, P, W
        )
        k = _convolve_and_keep(
            mixed, conv_rows, conv_weight, k_channels, read_slot, ring_slot, length, C, P, W
        )
        q = unit(q) * (K**-0.5)
        k = unit(k)
        place = row * HK + key_head
        if SPLIT:
            k_high, q_high = k.to(tl.bfloat16), q.to(tl.bfloat16)
            pair = pairs + place * (4 * K) + key
            tl.store(pair, k_high)
            tl.store(pair + K, q_high)
            tl.store(pair + 2 * K, (k - k_high.to(tl.float32)).to(tl.bfloat16))
            tl.store(pair + 3 * K, (q - q_high.to(tl.float32)).to(tl.bfloat16))
        else:
            pair = pairs + place * (2 * K) + key
            tl.store(pair, k)
            tl.store(pair + K, q)
        k_old = k_old.to(tl.float32)
        with_k = tl.sum(k_old * k[None, :], 1)
        with_q = tl.sum(k_old * q[None, :], 1)
        dot = dots + place * (2 * ENTRIES) + entries
        tl.store(dot, with_k)
        tl.store(dot + ENTRIES, tl.where(entries == length, tl.sum(k * q, 0), with_q))
        tl.store(ring_k_base + length * K + key, k.to(ring_k.dtype.element_ty))


@triton.jit
def _read_state(
    state_head, pair,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    USES_TENSOR_CORES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`S^T k` and `S^T q`, each [V], in float32; BLOCK_K rows of S at a time, STAGES - 1 copies in flight.

    On tensor cores a product [V, K] x [K, 16] with the upper and lower halves of k and q as
    columns, so that only the state's own format rounds.
    """
    value = tl.arange(0, V)
    line = tl.arange(0, 16)
    if USES_TENSOR_CORES:
        both = tl.zeros((V, 16), tl.float32)
    else:
        all_k = tl.zeros((BLOCK_K, V), tl.float32)
        all_q = tl.zeros((BLOCK_K, V), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_K)
        block = tl.load(state_head + row[:, None] * V + value[None, :], eviction_policy="evict_first")
        if USES_TENSOR_CORES:
            lines = tl.load(pair + line[:, None] * K + row[None, :], mask=(line < 4)[:, None], other=0.0)
            if INTERPRETED:
                block = block.to(tl.float32)
                lines = lines.to(tl.float32)
            both = tl.dot(tl.trans(block), tl.trans(lines), both)
        else:
            all_k += block.to(tl.float32) * tl.load(pair + row)[:, None]
            all_q += block.to(tl.float32) * tl.load(pair + K + row)[:, None]
    if USES_TENSOR_CORES:
        is_k = (line % 2 == 0)[None, :]
        return tl.sum(tl.where(is_k, both, 0.0), 1), tl.sum(tl.where(is_k, 0.0, both), 1)
    else:
        return tl.sum(all_k, 0), tl.sum(all_q, 0)


@triton.jit(do_not_specialize=["num_slots"])
def delta_values_kernel(
    state, ring_u, ring_log_decay, read_slots, ring_slots, lengths,
    a, b, z, A_log, dt_bias, norm_weight, pairs, dots, values, out, numbers, scales,
    a_stride, b_stride, z_stride, num_slots, norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    USES_TENSOR_CORES: tl.constexpr, ROUNDED: tl.constexpr,
    PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H, R). K and V are powers of two, so only the ring's entries need masks.

    `ROUNDED` outputs go to `numbers` in E4M3 too, with scales `[H, R]`.
    """
    LINES: tl.constexpr = 4 if USES_TENSOR_CORES else 2
    head = tl.program_id(0)
    row = tl.program_id(1)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    if DEPENDENT:
        start_dependents()
        if PREFETCH:
            early_read, early_ring, early_length = _early_slots(
                read_slots, ring_slots, lengths, row, num_slots, P
            )
            prefetch_lines(state + (early_read * H + head) * (K * V), K * V)
            early_values = ring_u + (early_ring * H + head) * (P * V) + entries * V
            prefetch_to_l2(early_values, tl.where(entries < early_length, V * 4, 0))
        wait_for_producers()
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    read_slot = tl.load(read_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)
    place_out = (row * H + head) * V + value
    scale_out = scales + head * tl.num_programs(1) + row
    if ring_slot < 0:
        tl.store(out + place_out, tl.zeros((V,), out.dtype.element_ty))
        if ROUNDED:
            tl.store(numbers + place_out, tl.zeros((V,), tl.float32).to(numbers.dtype.element_ty))
            tl.store(scale_out, 0.0)
        return

    state_head = state + (read_slot * H + head) * (K * V)
    used = entries < length
    ring_u_base = ring_u + (ring_slot * H + head) * (P * V)
    log_decay_base = ring_log_decay + (ring_slot * H + head) * P
    u_old = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
    log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
    place = row * HK + head // (H // HK)
    dot = dots + place * (2 * ENTRIES) + entries
    with_k = tl.load(dot)
    with_q = tl.load(dot + ENTRIES)
    v = tl.load(values + (row * H + head) * V + value)
    own = tl.sum(tl.where(entries == length, with_q, 0.0), 0)
    gate_in = tl.load(z + row * z_stride + head * V + value).to(tl.float32)
    norm_in = tl.load(norm_weight + value).to(tl.float32)
    a_in = tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + row * b_stride + head).to(tl.float32)))

    # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
    log_decay = tl.min(log_decays, 0) - rate * softplus(a_in)
    weight = tl.where(used, tl.exp(log_decay - log_decays), 0.0)
    decay = tl.exp(log_decay)
    predicted, read = _read_state(
        state_head, pairs + place * (LINES * K), K, V, BLOCK_K, STAGES, USES_TENSOR_CORES, INTERPRETED
    )
    u_old = u_old.to(tl.float32)
    ring_predicted = tl.sum(u_old * (with_k * weight)[:, None], 0)
    ring_read = tl.sum(u_old * (with_q * weight)[:, None], 0)
    u = beta * (v - decay * predicted - ring_predicted)
    o = decay * read + ring_read + own * u
    norm = norm_in * tl.rsqrt(tl.sum(o * o, 0) / V + norm_eps)
    left = (o * norm * silu(gate_in)).to(out.dtype.element_ty)
    tl.store(out + place_out, left)
    if ROUNDED:
        rounded, scale = e4m3_groups(left.to(tl.float32), V)
        tl.store(numbers + place_out, rounded.to(numbers.dtype.element_ty))
        tl.store(scale_out + tl.arange(0, 1), scale)
    tl.store(ring_u_base + length * V + value, u.to(ring_u.dtype.element_ty))
    tl.store(log_decay_base + length, log_decay.to(ring_log_decay.dtype.element_ty))
