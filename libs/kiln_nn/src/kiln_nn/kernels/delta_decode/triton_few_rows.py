"""The decode step's device code for few rows, in one launch; `triton.py` launches it.

With few rows nothing is short of bandwidth: a step takes as long as its loads and sums wait for each
other. So a program, of one value head of one row, asks for everything that lies in memory before it waits
for its token's projections: the committed state comes to its registers, with the ring and the
convolution's tail. What is left then are sums. The convolution of a key head is done once for each of its
value heads, of which the first keeps it.

That much is read early only if the caller says so (`EARLY`). Nothing in a step writes what its programs
read: they append a row's entry, which none of them reads.

Legend: as in `memory.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import silu, softplus
from kiln_nn.kernels.dependent_launch import start_dependents, wait_for_producers


@triton.jit
def _add_pairs(first, second, more_first, more_second):
    return first + more_first, second + more_second


@triton.jit
def _sums(first, second, AXIS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Of two tensors along one axis, in one pass; the interpreter takes minutes to do that."""
    if INTERPRETED:
        return tl.sum(first, AXIS), tl.sum(second, AXIS)
    else:
        return tl.reduce((first, second), AXIS, _add_pairs)


@triton.jit
def _add_triples(first, second, third, more_first, more_second, more_third):
    return first + more_first, second + more_second, third + more_third


@triton.jit
def _products(k, q, INTERPRETED: tl.constexpr):
    """Of k with itself, of q with itself and of both, in one pass."""
    if INTERPRETED:
        return tl.sum(k * k, 0), tl.sum(q * q, 0), tl.sum(k * q, 0)
    else:
        return tl.reduce((k * k, q * q, k * q), 0, _add_triples)


@triton.jit
def _taps(
    conv_rows, conv_weight, channels, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The J rows before the token and all W weights of these channels, as they are in memory."""
    J: tl.constexpr = W - 1
    rows: tl.tuple = ()
    weights: tl.tuple = ()
    for tap in tl.static_range(J):
        place = length + tap
        slot = tl.where(place < J, read_slot, ring_slot)
        rows += (tl.load(conv_rows + (slot * (J + P) + place) * C + channels),)
    for tap in tl.static_range(W):
        weights += (tl.load(conv_weight + channels * W + tap),)
    return rows, weights


@triton.jit
def _convolve(rows, weights, token, J: tl.constexpr):
    y = token.to(tl.float32) * weights[J].to(tl.float32)
    for tap in tl.static_range(J):
        y += rows[tap].to(tl.float32) * weights[tap].to(tl.float32)
    return silu(y)


@triton.jit(do_not_specialize=["norm_eps"])
def delta_few_rows_kernel(
    state, ring_k, ring_u, ring_log_decay, conv_rows, read_slots, ring_slots, lengths,
    mixed, a, b, z, conv_weight, A_log, dt_bias, norm_weight, out,
    mixed_stride, a_stride, b_stride, z_stride, norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRIES: tl.constexpr, W: tl.constexpr, EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H, R). K and V are powers of two, so only the ring's entries need masks."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    J: tl.constexpr = W - 1
    head = tl.program_id(0)
    row = tl.program_id(1)
    key_head = head // GROUP
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    if DEPENDENT:
        start_dependents()
        if not EARLY:
            wait_for_producers()
    ring_slot = tl.load(ring_slots + row).to(tl.int64)
    read_slot = tl.load(read_slots + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int64)
    out_row = out + (row * H + head) * V + value
    if ring_slot < 0:
        if DEPENDENT and EARLY:
            wait_for_producers()
        tl.store(out_row, tl.zeros((V,), out.dtype.element_ty))
        return

    places = (read_slot * H + head) * (K * V) + key[:, None] * V + value[None, :]
    # In the pieces that all sums are made in, or the compiler turns the whole state around.
    committed = tl.load(state + tl.max_contiguous(places, (1, 4)), eviction_policy="evict_first")
    used = entries < length
    ring_k_base = ring_k + (ring_slot * HK + key_head) * (P * K)
    ring_u_base = ring_u + (ring_slot * H + head) * (P * V)
    log_decay_base = ring_log_decay + (ring_slot * H + head) * P
    k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
    u_old = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
    log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
    q_channels = key_head * K + key
    k_channels = HK * K + q_channels
    v_channels = 2 * HK * K + head * V + value
    q_rows, q_weights = _taps(conv_rows, conv_weight, q_channels, read_slot, ring_slot, length, C, P, W)
    k_rows, k_weights = _taps(conv_rows, conv_weight, k_channels, read_slot, ring_slot, length, C, P, W)
    v_rows, v_weights = _taps(conv_rows, conv_weight, v_channels, read_slot, ring_slot, length, C, P, W)
    norm_in = tl.load(norm_weight + value)
    bias_in = tl.load(dt_bias + head)
    rate_in = tl.load(A_log + head)
    if DEPENDENT and EARLY:
        wait_for_producers()

    mixed += row * mixed_stride
    q_token = tl.load(mixed + q_channels)
    k_token = tl.load(mixed + k_channels)
    v_token = tl.load(mixed + v_channels)
    gate_in = tl.load(z + row * z_stride + head * V + value)
    a_in = tl.load(a + row * a_stride + head)
    b_in = tl.load(b + row * b_stride + head)
    # Only from here on, or the loads above would be asked for when those before the wait have come.
    q = _convolve(q_rows, q_weights, q_token, J)
    k = _convolve(k_rows, k_weights, k_token, J)
    v = _convolve(v_rows, v_weights, v_token, J)
    rate = tl.exp(rate_in.to(tl.float32)) * softplus(a_in.to(tl.float32) + bias_in.to(tl.float32))
    beta = 1.0 / (1.0 + tl.exp(-b_in.to(tl.float32)))
    # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
    log_decay = tl.min(log_decays, 0) - rate
    weight = tl.where(used, tl.exp(log_decay - log_decays), 0.0)
    decay = tl.exp(log_decay)

    # q and k are scaled to length 1 behind their products, which need not wait for that.
    k_square, q_square, own = _products(k, q, INTERPRETED)
    k_scale = tl.rsqrt(k_square + 1e-6)
    q_scale = tl.rsqrt(q_square + 1e-6) * (K**-0.5)
    k_old = k_old.to(tl.float32)
    u_old = u_old.to(tl.float32)
    committed = committed.to(tl.float32)
    with_k, with_q = _sums(k_old * k[None, :], k_old * q[None, :], 1, INTERPRETED)
    predicted, read = _sums(committed * k[:, None], committed * q[:, None], 0, INTERPRETED)
    ring_predicted, ring_read = _sums(
        u_old * (with_k * weight)[:, None], u_old * (with_q * weight)[:, None], 0, INTERPRETED
    )
    u = beta * (v - k_scale * (decay * predicted + ring_predicted))
    o = q_scale * (decay * read + ring_read + own * k_scale * u)
    norm = norm_in.to(tl.float32) * tl.rsqrt(tl.sum(o * o, 0) / V + norm_eps)
    tl.store(out_row, (o * norm * silu(gate_in.to(tl.float32))).to(out.dtype.element_ty))

    tl.store(ring_u_base + length * V + value, u.to(ring_u.dtype.element_ty))
    tl.store(log_decay_base + length, log_decay.to(ring_log_decay.dtype.element_ty))
    kept = conv_rows + (ring_slot * (J + P) + J + length) * C
    tl.store(kept + v_channels, v_token.to(conv_rows.dtype.element_ty))
    if head % GROUP == 0:
        tl.store(ring_k_base + length * K + key, (k * k_scale).to(ring_k.dtype.element_ty))
        tl.store(kept + q_channels, q_token.to(conv_rows.dtype.element_ty))
        tl.store(kept + k_channels, k_token.to(conv_rows.dtype.element_ty))
