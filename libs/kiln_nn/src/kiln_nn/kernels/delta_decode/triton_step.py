"""The decode step's device code; `triton.py` launches it and states what it supports.

One program takes one value head of one row: the convolution of that head's q, k and v channels,
the ring, then the whole width of the `[K, V]` state, a few rows in flight at a time.
Value heads that share a key head convolve its q and k channels each for themselves (a few
kilobytes from the cache); the first of them alone writes what they share. Nothing another
program of the same launch reads is written, so one launch does it all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """`log(1 + e^x)`; small results keep their relative precision, which slow decays need."""
    y = tl.exp(tl.minimum(x, 20.0))
    s = y / (2.0 + y)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (0.2 + s2 * (1.0 / 7 + s2 / 9))))
    return tl.where(x > 20.0, x, tl.where(y < 0.25, series, tl.log(1.0 + y)))


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _prefetch_state(state_head, K: tl.constexpr, V: tl.constexpr):
    """Ask for a head's state to come to the L2 cache, while the program does something else."""
    LINE: tl.constexpr = 128 // (state_head.dtype.element_ty.primitive_bitwidth // 8)
    lines = (state_head + tl.arange(0, K * V // LINE) * LINE).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _convolve(
    mixed, conv_rows, conv_weight, channels, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of one token's channels; the J rows before it come from tail and ring."""
    J: tl.constexpr = W - 1
    y = tl.load(mixed + channels).to(tl.float32) * tl.load(conv_weight + channels * W + J).to(tl.float32)
    for tap in tl.static_range(J):
        place = length + tap
        slot = tl.where(place < J, read_slot, ring_slot)
        row = tl.load(conv_rows + (slot * (J + P) + place) * C + channels).to(tl.float32)
        y += row * tl.load(conv_weight + channels * W + tap).to(tl.float32)
    return _silu(y)


@triton.jit
def _keep_conv_rows(
    mixed, conv_rows, channels, ring_slot, length, commit_slot,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Append the token's channels to the ring; on a commit the last J rows become the new tail."""
    J: tl.constexpr = W - 1
    x = tl.load(mixed + channels).to(conv_rows.dtype.element_ty)
    tl.store(conv_rows + (ring_slot * (J + P) + J + length) * C + channels, x)
    if commit_slot >= 0:
        tail = conv_rows + commit_slot * (J + P) * C + channels
        for tap in tl.static_range(1, J):
            row = tl.load(conv_rows + (ring_slot * (J + P) + length + tap) * C + channels)
            tl.store(tail + (tap - 1) * C, row)
        tl.store(tail + (J - 1) * C, x)


@triton.jit
def _read_state(
    state_head, k, q,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`S^T k` and `S^T q`, each [V], in float32; BLOCK_K rows of S at a time, STAGES copies in flight.

    "split": k and q as the live rows of a 16-row bf16 product, each as a sum of two bf16 numbers,
    so that only the state's own format rounds. "tf32x3": float32 through three tf32 products.
    "fma": without tensor cores.
    """
    value = tl.arange(0, V)
    line = tl.arange(0, 16)[:, None]
    if FORM == "fma":
        all_k = tl.zeros((BLOCK_K, V), tl.float32)
        all_q = tl.zeros((BLOCK_K, V), tl.float32)
    else:
        both = tl.zeros((16, V), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_K)
        block = tl.load(state_head + row[:, None] * V + value[None, :])
        k_part = tl.gather(k, row, 0)
        q_part = tl.gather(q, row, 0)
        if FORM == "fma":
            all_k += block.to(tl.float32) * k_part[:, None]
            all_q += block.to(tl.float32) * q_part[:, None]
        else:
            pair = tl.where(line % 2 == 0, k_part[None, :], q_part[None, :])
            if FORM == "tf32x3":
                pair = tl.where(line < 2, pair, 0.0)
                both = tl.dot(pair, block.to(tl.float32), both, input_precision="tf32x3")
            else:
                high = pair.to(tl.bfloat16)
                low = (pair - high.to(tl.float32)).to(tl.bfloat16)
                parts = tl.where(line < 2, high, tl.where(line < 4, low, tl.zeros_like(low)))
                if INTERPRETED:
                    both = tl.dot(parts.to(tl.float32), block.to(tl.float32), both)
                else:
                    both = tl.dot(parts, block, both)
    if FORM == "fma":
        return tl.sum(all_k, 0), tl.sum(all_q, 0)
    else:
        with_k = tl.sum(tl.where(line % 2 == 0, both, 0.0), 0)
        with_q = tl.sum(tl.where(line % 2 == 1, both, 0.0), 0)
        return with_k, with_q


@triton.jit
def _read_ring(ring_k, ring_u, weight, k, q, FORM: tl.constexpr):
    """`sum_i weight_i (k_i . k) u_i` and the same for q, each [V]; a ring is [entries, width]."""
    if FORM == "fma":
        with_k = tl.sum(ring_k * k[None, :], 1) * weight
        with_q = tl.sum(ring_k * q[None, :], 1) * weight
        return tl.sum(ring_u * with_k[:, None], 0), tl.sum(ring_u * with_q[:, None], 0)
    else:
        line = tl.arange(0, 16)[:, None]
        pair = tl.where(line == 0, k[None, :], tl.where(line == 1, q[None, :], 0.0))
        dots = tl.dot(pair, tl.trans(ring_k), input_precision=FORM) * weight[None, :]
        both = tl.dot(dots, ring_u, input_precision=FORM)
        with_k = tl.sum(tl.where(line == 0, both, 0.0), 0)
        with_q = tl.sum(tl.where(line == 1, both, 0.0), 0)
        return with_k, with_q


@triton.jit
def _commit_state(
    source, target, ring_k_base, ring_u_base, k, u, weight, entries, length, decay,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """`S <- decay S + sum_i weight_i k_i u_i^T`, this token last, BLOCK_K rows of S at a time.

    State and ring are read again, from the cache: keeping them for the one step in sixteen that
    commits would cost every step its registers.
    """
    value = tl.arange(0, V)
    u_old = tl.load(
        ring_u_base + entries[:, None] * V + value[None, :], mask=(entries < length)[:, None], other=0.0
    ).to(tl.float32)
    u_all = tl.where((entries == length)[:, None], u[None, :], u_old)
    for first in tl.range(0, K, BLOCK_K, num_stages=1, loop_unroll_factor=1):
        row = first + tl.arange(0, BLOCK_K)
        k_old = tl.load(
            ring_k_base + entries[None, :] * K + row[:, None], mask=(entries < length)[None, :], other=0.0
        ).to(tl.float32)
        # This token's key is not read back: another program writes it.
        k_own = tl.gather(k, row, 0)
        k_all = tl.where((entries == length)[None, :], k_own[:, None], k_old * weight[None, :])
        places = row[:, None] * V + value[None, :]
        old = tl.load(source + places).to(tl.float32)
        new = decay * old + tl.dot(k_all, u_all, input_precision=FORM)
        tl.store(target + places, new.to(target.dtype.element_ty))


@triton.jit
def delta_decode_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows,
    read_slots, ring_slots, lengths, commit_slots,
    mixed, a, b, z, conv_weight, A_log, dt_bias, norm_weight, out,
    mixed_stride, a_stride, b_stride, z_stride,
    norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, ENTRIES: tl.constexpr, W: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, COMMIT_BLOCK_K: tl.constexpr,
    STATE_FORM: tl.constexpr, RING_FORM: tl.constexpr, COMMIT_FORM: tl.constexpr,
    PREFETCH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H, R). K and V are powers of two, so only the ring's entries need masks."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    head = tl.program_id(0)
    row = tl.program_id(1)
    key_head = head // GROUP
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    out_row = out + (row * H + head) * V + value
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    if ring_slot < 0:
        tl.store(out_row, tl.zeros((V,), out.dtype.element_ty))
        return
    read_slot = tl.load(read_slots + row).to(tl.int64)
    commit_slot = tl.load(commit_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)

    state_head = state + (read_slot * H + head) * K * V
    if PREFETCH:
        _prefetch_state(state_head, K, V)
    used = entries < length
    ring_k_base = ring_k + (ring_slot * HK + key_head) * P * K
    ring_u_base = ring_u + (ring_slot * H + head) * P * V
    log_decay_base = ring_log_decay + (ring_slot * H + head) * P
    k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
    u_old = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
    log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
    k_old, u_old = k_old.to(tl.float32), u_old.to(tl.float32)

    mixed += row * mixed_stride
    q_channels = key_head * K + key
    k_channels = HK * K + q_channels
    v_channels = 2 * HK * K + head * V + value
    q = _convolve(mixed, conv_rows, conv_weight, q_channels, read_slot, ring_slot, length, C, P, W)
    k = _convolve(mixed, conv_rows, conv_weight, k_channels, read_slot, ring_slot, length, C, P, W)
    v = _convolve(mixed, conv_rows, conv_weight, v_channels, read_slot, ring_slot, length, C, P, W)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (K**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)

    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    a_and_bias = tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + row * b_stride + head).to(tl.float32)))
    # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
    log_decay = tl.min(log_decays, 0) - rate * _softplus(a_and_bias)
    weight = tl.where(used, tl.exp(log_decay - log_decays), 0.0)
    decay = tl.exp(log_decay)

    ring_predicted, ring_read = _read_ring(k_old, u_old, weight, k, q, RING_FORM)
    predicted, read = _read_state(state_head, k, q, K, V, BLOCK_K, STAGES, STATE_FORM, INTERPRETED)
    u = beta * (v - decay * predicted - ring_predicted)
    o = decay * read + ring_read + tl.sum(k * q, 0) * u

    gate = _silu(tl.load(z + row * z_stride + head * V + value).to(tl.float32))
    norm = tl.load(norm_weight + value).to(tl.float32) * tl.rsqrt(tl.sum(o * o, 0) / V + norm_eps)
    tl.store(out_row, (o * norm * gate).to(out.dtype.element_ty))

    tl.store(ring_u_base + length * V + value, u.to(ring_u.dtype.element_ty))
    tl.store(log_decay_base + length, log_decay.to(ring_log_decay.dtype.element_ty))
    _keep_conv_rows(mixed, conv_rows, v_channels, ring_slot, length, commit_slot, C, P, W)
    if head % GROUP == 0:
        tl.store(ring_k_base + length * K + key, k.to(ring_k.dtype.element_ty))
        _keep_conv_rows(mixed, conv_rows, q_channels, ring_slot, length, commit_slot, C, P, W)
        _keep_conv_rows(mixed, conv_rows, k_channels, ring_slot, length, commit_slot, C, P, W)
    if commit_slot >= 0:
        target = state + (commit_slot * H + head) * K * V
        _commit_state(
            state_head, target, ring_k_base, ring_u_base, k, u, weight, entries, length, decay,
            K, V, COMMIT_BLOCK_K, COMMIT_FORM,
        )  # fmt: skip
