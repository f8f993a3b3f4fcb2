"""The decode step's device code; `triton.py` launches it and states what it supports.

One program takes one row and HEADS value heads that share a key head: the convolution of their q,
k and v channels, the ring, then the whole width of their `[K, V]` states, a few rows in flight at a
time. Everything small is asked for at the start, together with the state's way into the L2 cache, so
that a program waits for memory twice: for its slots, and for everything they name.
Programs that share a key head convolve its q and k channels each for themselves; the first of
them alone writes what they share. Nothing another program of the same launch reads is written, so
one launch does it all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import convolve, prefetch_lines, silu, softplus, unit
from kiln_nn.kernels.dependent_launch import start_dependents, wait_for_producers


@triton.jit
def _keep_conv_rows(
    token, conv_rows, channels, ring_slot, length, commit_slot,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Append the token's channels to the ring; on a commit the last J rows become the new tail."""
    J: tl.constexpr = W - 1
    x = token.to(conv_rows.dtype.element_ty)
    tl.store(conv_rows + (ring_slot * (J + P) + J + length) * C + channels, x)
    if commit_slot >= 0:
        tail = conv_rows + commit_slot * (J + P) * C + channels
        for tap in tl.static_range(1, J):
            row = tl.load(conv_rows + (ring_slot * (J + P) + length + tap) * C + channels)
            tl.store(tail + (tap - 1) * C, row)
        tl.store(tail + (J - 1) * C, x)


@triton.jit
def _state_places(rows, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr):
    """Offsets `[rows, HEADS * V]` of some rows of neighbouring heads' states."""
    column = tl.arange(0, HEADS * V)
    return (column // V * (K * V) + column % V)[None, :] + rows[:, None] * V


@triton.jit
def _split_pair(k, q, line):
    """k and q as the live rows of a 16-row bf16 operand, each as a sum of two bf16 numbers."""
    pair = tl.where(line % 2 == 0, k[None, :], q[None, :])
    high = pair.to(tl.bfloat16)
    low = (pair - high.to(tl.float32)).to(tl.bfloat16)
    return tl.where(line < 2, high, tl.where(line < 4, low, tl.zeros_like(low)))


@triton.jit
def _read_state(
    states, k, q,
    K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`S^T k` and `S^T q` of HEADS heads, each [HEADS * V] in float32.

    BLOCK_K rows of S at a time, STAGES copies in flight.
    "split": k and q as rows of a tensor-core product, so that only the state's own format rounds.
    "fma": without tensor cores.
    """
    line = tl.arange(0, 16)[:, None]
    if FORM == "fma":
        all_k = tl.zeros((BLOCK_K, HEADS * V), tl.float32)
        all_q = tl.zeros((BLOCK_K, HEADS * V), tl.float32)
    else:
        both = tl.zeros((16, HEADS * V), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_K)
        block = tl.load(states + _state_places(row, K, V, HEADS), eviction_policy="evict_first")
        k_part = tl.gather(k, row, 0)
        q_part = tl.gather(q, row, 0)
        if FORM == "fma":
            all_k += block.to(tl.float32) * k_part[:, None]
            all_q += block.to(tl.float32) * q_part[:, None]
        elif INTERPRETED:
            parts = _split_pair(k_part, q_part, line).to(tl.float32)
            both = tl.dot(parts, block.to(tl.float32), both)
        else:
            both = tl.dot(_split_pair(k_part, q_part, line), block, both)
    if FORM == "fma":
        return tl.sum(all_k, 0), tl.sum(all_q, 0)
    else:
        with_k = tl.sum(tl.where(line % 2 == 0, both, 0.0), 0)
        with_q = tl.sum(tl.where(line % 2 == 1, both, 0.0), 0)
        return with_k, with_q


@triton.jit
def _commit_state(
    sources, targets, ring_k_base, ring_u_base, k, u, weight, length, decay,
    K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """`S <- decay S + sum_i weight_i k_i u_i^T`, this token last, BLOCK_K rows of S at a time.

    State and ring are read again, from the cache: keeping them for the one step in sixteen that
    commits would cost every step its registers. `u` is [HEADS, V], `weight` [ENTRIES, HEADS].
    """
    entries = tl.arange(0, ENTRIES)
    head = tl.arange(0, HEADS)
    value = tl.arange(0, V)
    u_places = (head[:, None] * (P * V) + value[None, :])[None, :, :] + entries[:, None, None] * V
    u_old = tl.load(ring_u_base + u_places, mask=(entries < length)[:, None, None], other=0.0)
    u_old = u_old.to(tl.float32) * weight[:, :, None]
    u_all = tl.where((entries == length)[:, None, None], u[None, :, :], u_old)
    u_all = tl.reshape(u_all, (ENTRIES, HEADS * V))
    decays = tl.reshape(tl.broadcast_to(decay[:, None], (HEADS, V)), (HEADS * V,))
    for first in tl.range(0, K, BLOCK_K, num_stages=1, loop_unroll_factor=1):
        row = first + tl.arange(0, BLOCK_K)
        k_old = tl.load(
            ring_k_base + entries[None, :] * K + row[:, None], mask=(entries < length)[None, :], other=0.0
        ).to(tl.float32)
        # This token's key is not read back: another program writes it.
        k_own = tl.gather(k, row, 0)
        k_all = tl.where((entries == length)[None, :], k_own[:, None], k_old)
        places = _state_places(row, K, V, HEADS)
        old = tl.load(sources + places).to(tl.float32)
        new = decays[None, :] * old + tl.dot(k_all, u_all, input_precision=FORM)
        tl.store(targets + places, new.to(targets.dtype.element_ty))


@triton.jit(do_not_specialize=["num_slots"])
def delta_decode_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows,
    read_slots, ring_slots, lengths, commit_slots,
    mixed, a, b, z, conv_weight, A_log, dt_bias, norm_weight, out,
    mixed_stride, a_stride, b_stride, z_stride,
    num_slots, norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, ENTRIES: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, COMMIT_BLOCK_K: tl.constexpr,
    STATE_FORM: tl.constexpr, COMMIT_FORM: tl.constexpr,
    PREFETCH: tl.constexpr, DEPENDENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H / HEADS, R). K, V and HEADS are powers of two, so only the ring's entries need masks."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    first_head = tl.program_id(0) * HEADS
    row = tl.program_id(1)
    key_head = first_head // GROUP
    if DEPENDENT:
        start_dependents()
        # Where the producers are about to write this number, some other slot comes to the cache.
        early_slot = tl.load(read_slots + row, volatile=True).to(tl.int64)
        early_slot = tl.minimum(tl.maximum(early_slot, 0), num_slots - 1)
        prefetch_lines(state + (early_slot * H + first_head) * (K * V), HEADS * K * V)
        wait_for_producers()
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    read_slot = tl.load(read_slots + row).to(tl.int64)
    commit_slot = tl.load(commit_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    heads = first_head + tl.arange(0, HEADS)
    outputs = heads[:, None] * V + value[None, :]
    if ring_slot < 0:
        tl.store(out + row * (H * V) + outputs, tl.zeros((HEADS, V), out.dtype.element_ty))
        return

    states = state + (read_slot * H + first_head) * (K * V)
    if PREFETCH:
        prefetch_lines(states, HEADS * K * V)
    used = entries < length
    ring_k_base = ring_k + (ring_slot * HK + key_head) * (P * K)
    ring_u_base = ring_u + (ring_slot * H + first_head) * (P * V)
    log_decay_places = (ring_slot * H + heads) * P
    k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
    u_places = (tl.arange(0, HEADS)[:, None] * (P * V) + value[None, :])[None, :, :] + entries[
        :, None, None
    ] * V
    u_old = tl.load(ring_u_base + u_places, mask=used[:, None, None], other=0.0)
    log_decays = tl.load(
        ring_log_decay + log_decay_places[None, :] + entries[:, None], mask=used[:, None], other=0.0
    )
    gates_in = tl.load(z + row * z_stride + outputs)
    norm_in = tl.load(norm_weight + value)
    a_in = tl.load(a + row * a_stride + heads).to(tl.float32) + tl.load(dt_bias + heads).to(tl.float32)
    rate = tl.exp(tl.load(A_log + heads).to(tl.float32))
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + row * b_stride + heads).to(tl.float32)))

    mixed += row * mixed_stride
    q_channels = key_head * K + key
    k_channels = HK * K + q_channels
    v_channels = 2 * HK * K + outputs
    q_token = tl.load(mixed + q_channels)
    k_token = tl.load(mixed + k_channels)
    v_token = tl.load(mixed + v_channels)
    q = convolve(q_token, conv_rows, conv_weight, q_channels, read_slot, ring_slot, length, C, P, W)
    k = convolve(k_token, conv_rows, conv_weight, k_channels, read_slot, ring_slot, length, C, P, W)
    v = convolve(v_token, conv_rows, conv_weight, v_channels, read_slot, ring_slot, length, C, P, W)
    v = silu(v)
    q = unit(silu(q)) * (K**-0.5)
    k = unit(silu(k))

    # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
    log_decay = tl.min(log_decays, 0) - rate * softplus(a_in)
    weight = tl.where(used[:, None], tl.exp(log_decay[None, :] - log_decays), 0.0)
    decay = tl.exp(log_decay)

    k_old, u_old = k_old.to(tl.float32), u_old.to(tl.float32)
    with_k = tl.sum(k_old * k[None, :], 1)[:, None] * weight
    with_q = tl.sum(k_old * q[None, :], 1)[:, None] * weight
    ring_predicted = tl.sum(u_old * with_k[:, :, None], 0)
    ring_read = tl.sum(u_old * with_q[:, :, None], 0)
    own = tl.sum(k * q, 0)
    predicted, read = _read_state(states, k, q, K, V, HEADS, BLOCK_K, STAGES, STATE_FORM, INTERPRETED)
    predicted = tl.reshape(predicted, (HEADS, V))
    read = tl.reshape(read, (HEADS, V))
    u = beta[:, None] * (v - decay[:, None] * predicted - ring_predicted)
    o = decay[:, None] * read + ring_read + own * u

    norm = tl.rsqrt(tl.sum(o * o, 1) / V + norm_eps)[:, None] * norm_in.to(tl.float32)[None, :]
    o = o * norm * silu(gates_in.to(tl.float32))
    tl.store(out + row * (H * V) + outputs, o.to(out.dtype.element_ty))

    u_target = ring_u_base + tl.arange(0, HEADS)[:, None] * (P * V) + length * V + value[None, :]
    tl.store(u_target, u.to(ring_u.dtype.element_ty))
    tl.store(ring_log_decay + log_decay_places + length, log_decay.to(ring_log_decay.dtype.element_ty))
    _keep_conv_rows(v_token, conv_rows, v_channels, ring_slot, length, commit_slot, C, P, W)
    if first_head % GROUP == 0:
        tl.store(ring_k_base + length * K + key, k.to(ring_k.dtype.element_ty))
        _keep_conv_rows(q_token, conv_rows, q_channels, ring_slot, length, commit_slot, C, P, W)
        _keep_conv_rows(k_token, conv_rows, k_channels, ring_slot, length, commit_slot, C, P, W)
    if commit_slot >= 0:
        targets = state + (commit_slot * H + first_head) * (K * V)
        _commit_state(
            states, targets, ring_k_base, ring_u_base, k, u, weight, length, decay,
            K, V, HEADS, P, ENTRIES, COMMIT_BLOCK_K, COMMIT_FORM,
        )  # fmt: skip
