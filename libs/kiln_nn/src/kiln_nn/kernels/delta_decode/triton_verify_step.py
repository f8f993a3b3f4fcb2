"""Device code for several new tokens per row; `triton_verify.py` launches it.

Two launches, divided as those of one token are (triton_step.py). `verify_keys_kernel` convolves, and
multiplies keys and queries with the keys that are there and with each other. `verify_values_kernel`
takes one value head of one row: the state, the ring's values, then the new tokens' corrections.

The new tokens stand in tiles of 2 L lines, L being 4 or 8: token i as key in line i, as query in line
L + i. Full pages have been folded before; where that left a row follows from the numbers it had
(`_begun`). Nothing that another program of the same launch reads is written.
"""

# Tuples of tensors grow while loops are unrolled.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import prefetch_lines, silu, softplus
from kiln_nn.kernels.dependent_launch import prefetch_to_l2, start_dependents, wait_for_producers


@triton.jit
def _begun(read_slots, ring_slots, lengths, commit_slots, row, PAGE: tl.constexpr, EARLY: tl.constexpr):
    """Read slot, ring slot and length of a row whose full page has been folded, if it had one.

    EARLY is before the producers have ended.
    """
    read_slot = tl.load(read_slots + row, volatile=EARLY).to(tl.int64)
    ring_slot = tl.load(ring_slots + row, volatile=EARLY).to(tl.int64)
    length = tl.load(lengths + row, volatile=EARLY).to(tl.int64)
    commit_slot = tl.load(commit_slots + row, volatile=EARLY).to(tl.int64)
    is_folded = commit_slot >= 0
    read_slot = tl.where(is_folded, commit_slot, read_slot)
    ring_slot = tl.where(is_folded, commit_slot, ring_slot)
    return read_slot, ring_slot, length - tl.where(is_folded, PAGE, 0)


@triton.jit
def _begun_early(read_slots, ring_slots, lengths, commit_slots, row, num_slots, PAGE: tl.constexpr):
    """The same before the producers have ended, bent into range.

    Where a producer is about to write a row's numbers, the wrong lines come to the cache, and no more.
    """
    read_slot, ring_slot, length = _begun(read_slots, ring_slots, lengths, commit_slots, row, PAGE, True)
    read_slot = tl.minimum(tl.maximum(read_slot, 0), num_slots - 1)
    ring_slot = tl.minimum(tl.maximum(ring_slot, 0), num_slots - 1)
    return read_slot, ring_slot, tl.minimum(tl.maximum(length, 0), PAGE)


@triton.jit
def _taps(conv_weight, channels, W: tl.constexpr):
    """The convolution's weights of some channels, tap by tap."""
    taps = ()
    for tap in tl.static_range(W):
        taps += (tl.load(conv_weight + channels * W + tap),)
    return taps


@triton.jit
def _inputs(
    mixed, token_stride, conv_rows, channels, num_new, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Some channels of the J tokens before the new ones, from tail and ring, and of these; zero where none is."""
    J: tl.constexpr = W - 1
    inputs = ()
    for tap in tl.static_range(J):
        place = length + tap
        slot = tl.where(place < J, read_slot, ring_slot)
        inputs += (tl.load(conv_rows + (slot * (J + P) + place) * C + channels),)
    for token in tl.static_range(NEW):
        inputs += (tl.load(mixed + token * token_stride + channels, mask=token < num_new, other=0.0),)
    return inputs


@triton.jit
def _convolved(inputs, taps, token: tl.constexpr, num_new, W: tl.constexpr):
    """`silu` of the convolution of one of the new tokens; zero where there is none."""
    y = inputs[token].to(tl.float32) * taps[0].to(tl.float32)
    for tap in tl.static_range(1, W):
        y += inputs[token + tap].to(tl.float32) * taps[tap].to(tl.float32)
    return tl.where(token < num_new, silu(y), 0.0)


@triton.jit
def _keep_rows(
    inputs, conv_rows, channels, num_new, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Append the new tokens' channels to the ring's rows."""
    J: tl.constexpr = W - 1
    rows = conv_rows + (ring_slot * (J + P) + J + length) * C + channels
    for token in tl.static_range(NEW):
        own = inputs[J + token].to(conv_rows.dtype.element_ty)
        tl.store(rows + token * C, own, mask=token < num_new)


@triton.jit
def _four(lines, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Every STEP-th of the vectors as columns, [width, 4]."""
    even = tl.join(lines[FIRST], lines[FIRST + 2 * STEP])
    odd = tl.join(lines[FIRST + STEP], lines[FIRST + 3 * STEP])
    return tl.reshape(tl.join(even, odd), (lines[0].shape[0], 4))


@triton.jit
def _columns(inputs, taps, num_new, W: tl.constexpr, NEW: tl.constexpr, L: tl.constexpr):
    """The convolved tokens as columns, [width, L], those of no token zero."""
    lines = ()
    for token in tl.static_range(NEW):
        lines += (_convolved(inputs, taps, token, num_new, W),)
    for _ in tl.static_range(NEW, L):
        lines += (tl.zeros_like(lines[0]),)
    if L == 4:
        return _four(lines, 0, 1)
    else:
        return tl.reshape(tl.join(_four(lines, 0, 2), _four(lines, 1, 2)), (lines[0].shape[0], 8))


@triton.jit
def _products(x, y, DOT_FORM: tl.constexpr):
    """Every line of `x` [M, K] times every line of `y` [N, K], in shares of K that the warps divide."""
    K: tl.constexpr = x.shape[1]
    SHARES: tl.constexpr = 4 if K >= 64 else 1
    x = tl.permute(tl.reshape(x, (x.shape[0], SHARES, K // SHARES)), (1, 0, 2))
    y = tl.permute(tl.reshape(y, (y.shape[0], SHARES, K // SHARES)), (1, 2, 0))
    return tl.sum(tl.dot(x, y, input_precision=DOT_FORM), 0)


@triton.jit
def _values_program(
    conv_rows, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
    mixed, conv_weight, values, row, head, mixed_row, mixed_token,
    H: tl.constexpr, V: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    NEW: tl.constexpr, W: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Convolve the values of one head."""
    value = tl.arange(0, V)
    channels = C - H * V + head * V + value
    taps = _taps(conv_weight, channels, W)
    if DEPENDENT:
        wait_for_producers()
    read_slot, ring_slot, length = _begun(read_slots, ring_slots, lengths, commit_slots, row, PAGE, False)
    num_new = tl.minimum(tl.load(num_new_tokens + row).to(tl.int32), NEW)
    if ring_slot >= 0:
        inputs = _inputs(
            mixed + row * mixed_row, mixed_token, conv_rows, channels, num_new,
            read_slot, ring_slot, length, C, P, W, NEW,
        )  # fmt: skip
        for token in tl.static_range(NEW):
            v = _convolved(inputs, taps, token, num_new, W)
            tl.store(values + ((row * NEW + token) * H + head) * V + value, v)
        _keep_rows(inputs, conv_rows, channels, num_new, ring_slot, length, C, P, W, NEW)


@triton.jit
def _keys_program(
    ring_k, conv_rows, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
    mixed, conv_weight, pairs, dots, row, key_head, mixed_row, mixed_token,
    HK: tl.constexpr, K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    ENTRIES: tl.constexpr, NEW: tl.constexpr, L: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    DOT_FORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Convolve q and k of one key head, and multiply them with the ring's keys and each other."""
    entries = tl.arange(0, ENTRIES)
    line = tl.arange(0, 2 * L)
    key = tl.arange(0, K)
    q_channels = key_head * K + key
    k_channels = HK * K + q_channels
    k_taps = _taps(conv_weight, k_channels, W)
    q_taps = _taps(conv_weight, q_channels, W)
    if DEPENDENT:
        wait_for_producers()
    read_slot, ring_slot, length = _begun(read_slots, ring_slots, lengths, commit_slots, row, PAGE, False)
    num_new = tl.minimum(tl.load(num_new_tokens + row).to(tl.int32), NEW)
    if ring_slot >= 0:
        used = entries < length
        ring_k_base = ring_k + (ring_slot * HK + key_head) * (P * K)
        mixed += row * mixed_row
        k_inputs = _inputs(
            mixed, mixed_token, conv_rows, k_channels, num_new, read_slot, ring_slot, length, C, P, W, NEW
        )
        q_inputs = _inputs(
            mixed, mixed_token, conv_rows, q_channels, num_new, read_slot, ring_slot, length, C, P, W, NEW
        )
        k_old = tl.load(ring_k_base + entries[:, None] * K + key[None, :], mask=used[:, None], other=0.0)
        k_KL = _columns(k_inputs, k_taps, num_new, W, NEW, L)
        q_KL = _columns(q_inputs, q_taps, num_new, W, NEW, L)
        both = tl.reshape(tl.permute(tl.join(k_KL, q_KL), (0, 2, 1)), (K, 2 * L))
        scale = tl.rsqrt(tl.sum(both * both, 0) + 1e-6) * tl.where(line < L, 1.0, K**-0.5)
        pair = tl.trans(both * scale[None, :])
        place = row * HK + key_head
        is_kept = (line % L < NEW)[:, None]
        in_tile = pairs + place * ((4 if SPLIT else 2) * L * K) + line[:, None] * K + key[None, :]
        if SPLIT:
            high = pair.to(tl.bfloat16)
            tl.store(in_tile, high, mask=is_kept)
            tl.store(in_tile + 2 * L * K, (pair - high.to(tl.float32)).to(tl.bfloat16), mask=is_kept)
        else:
            tl.store(in_tile, pair, mask=is_kept)
        with_ring = _products(pair, k_old.to(tl.float32), DOT_FORM)
        with_new = _products(pair, pair, DOT_FORM)
        dot = dots + (place * (2 * L) + line)[:, None] * (ENTRIES + L)
        tl.store(dot + entries[None, :], with_ring)
        tl.store(dot + ENTRIES + line[None, :], with_new, mask=(line < L)[None, :])
        k_places = ring_k_base + (length + line)[:, None] * K + key[None, :]
        is_new = (line < L) & (line < num_new)
        tl.store(k_places, pair.to(ring_k.dtype.element_ty), mask=is_new[:, None])
        _keep_rows(k_inputs, conv_rows, k_channels, num_new, ring_slot, length, C, P, W, NEW)
        _keep_rows(q_inputs, conv_rows, q_channels, num_new, ring_slot, length, C, P, W, NEW)


@triton.jit(do_not_specialize=["num_slots"])
def verify_keys_kernel(
    ring_k, conv_rows, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
    mixed, conv_weight, pairs, dots, values,
    mixed_row, mixed_token, num_slots,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    PAGE: tl.constexpr, ENTRIES: tl.constexpr, NEW: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, SPLIT: tl.constexpr, DOT_FORM: tl.constexpr,
    MOST_PREFETCHED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (HK + H, R): the keys' programs, then those that only convolve a head's values.

    `pairs` [R, HK, 2 L, K] float32 has the tile of keys and queries; with SPLIT [R, HK, 2, 2 L, K]
    bfloat16 has its upper and its lower halves. `dots` [R, HK, 2 L, ENTRIES + L] has the tile's products
    with the ring's keys and the new ones. `values` [R, NEW, H, V] float32 has v. Of pairs, lines that
    never hold a token are left as they are.
    """
    C: tl.constexpr = 2 * HK * K + H * V
    program = tl.program_id(0)
    row = tl.program_id(1)
    if DEPENDENT:
        start_dependents()
        if tl.num_programs(1) <= MOST_PREFETCHED:
            entries = tl.arange(0, ENTRIES)
            _, ring_slot, length = _begun_early(
                read_slots, ring_slots, lengths, commit_slots, row, num_slots, PAGE
            )
            early_keys = ring_k + (ring_slot * HK + program % HK) * (P * K) + entries * K
            wanted = (entries < length) & (program < HK)
            prefetch_to_l2(early_keys, tl.where(wanted, K * 4, 0))
    if program < HK:
        _keys_program(
            ring_k, conv_rows, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
            mixed, conv_weight, pairs, dots, row, program, mixed_row, mixed_token,
            HK, K, P, C, PAGE, ENTRIES, NEW, L, W, SPLIT, DOT_FORM, DEPENDENT,
        )  # fmt: skip
    else:
        _values_program(
            conv_rows, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
            mixed, conv_weight, values, row, program - HK, mixed_row, mixed_token,
            H, V, P, C, PAGE, NEW, W, DEPENDENT,
        )  # fmt: skip


@triton.jit
def _read_state(
    state_head, pair, is_kept,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, DOT_FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The tile times the state, [2 L, V] in float32; a bf16 state meets the tile as two bf16 numbers."""
    both = tl.zeros((2 * L, V), tl.float32)
    line = tl.arange(0, 2 * L)[:, None]
    value = tl.arange(0, V)[None, :]
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_K)
        block = tl.load(state_head + row[:, None] * V + value, eviction_policy="evict_first")
        part = pair + line * K + row[None, :]
        if SPLIT:
            high = tl.load(part, mask=is_kept, other=0.0)
            low = tl.load(part + 2 * L * K, mask=is_kept, other=0.0)
            if INTERPRETED:
                high, low, block = high.to(tl.float32), low.to(tl.float32), block.to(tl.float32)
            both = tl.dot(high, block, both)
            both = tl.dot(low, block, both)
        else:
            lines = tl.load(part, mask=is_kept, other=0.0)
            both = tl.dot(lines, block.to(tl.float32), both, input_precision=DOT_FORM)
    return both


@triton.jit(do_not_specialize=["num_slots"])
def verify_values_kernel(
    state, ring_u, ring_log_decay, read_slots, ring_slots, lengths, commit_slots, num_new_tokens,
    a, b, z, A_log, dt_bias, norm_weight, pairs, dots, values, out,
    a_row, a_token, b_row, b_token, z_row, z_token, num_slots, norm_eps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    PAGE: tl.constexpr, ENTRIES: tl.constexpr, NEW: tl.constexpr, L: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, DOT_FORM: tl.constexpr,
    MOST_PREFETCHED: tl.constexpr, DEPENDENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H, R). K and V are powers of two, so only entries and lines need masks."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    if DEPENDENT:
        start_dependents()
        if tl.num_programs(1) <= MOST_PREFETCHED:
            read_slot, ring_slot, length = _begun_early(
                read_slots, ring_slots, lengths, commit_slots, row, num_slots, PAGE
            )
            prefetch_lines(state + (read_slot * H + head) * (K * V), K * V)
            early_values = ring_u + (ring_slot * H + head) * (P * V) + entries * V
            prefetch_to_l2(early_values, tl.where(entries < length, V * 4, 0))
        wait_for_producers()
    read_slot, ring_slot, length = _begun(read_slots, ring_slots, lengths, commit_slots, row, PAGE, False)
    num_new = tl.minimum(tl.load(num_new_tokens + row).to(tl.int32), NEW)
    line = tl.arange(0, 2 * L)
    new = line % L
    is_key = line < L
    is_kept = (new < NEW)[:, None]
    is_output = (line >= L)[:, None] & is_kept
    out_lines = out + ((row * NEW + new) * H + head)[:, None] * V + value[None, :]
    if ring_slot < 0:
        tl.store(out_lines, tl.zeros((2 * L, V), out.dtype.element_ty), mask=is_output)
        return

    state_head = state + (read_slot * H + head) * (K * V)
    ring_u_base = ring_u + (ring_slot * H + head) * (P * V)
    log_decay_base = ring_log_decay + (ring_slot * H + head) * P
    place = row * HK + head // (H // HK)
    used = entries < length
    live = new < num_new
    u_old = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
    log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
    dot = dots + (place * (2 * L) + line) * (ENTRIES + L)
    with_ring = tl.load(dot[:, None] + entries[None, :])
    v_places = values + ((row * NEW + new) * H + head)[:, None] * V + value[None, :]
    v = tl.load(v_places, mask=is_key[:, None] & is_kept, other=0.0)
    z_places = z + row * z_row + (new * z_token)[:, None] + head * V + value[None, :]
    gate_in = tl.load(z_places, mask=is_output & live[:, None], other=0.0)
    norm_in = tl.load(norm_weight + value).to(tl.float32)
    a_in = tl.load(a + row * a_row + new * a_token + head, mask=live, other=0.0).to(tl.float32)
    b_in = tl.load(b + row * b_row + new * b_token + head, mask=live, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    g = -rate * softplus(a_in + tl.load(dt_bias + head).to(tl.float32))
    beta = 1.0 / (1.0 + tl.exp(-b_in))

    # The sum of log-decays only falls: its last entry is its smallest, and it starts at 0.
    is_before = is_key[None, :] & (line[None, :] <= new[:, None])
    log_decay = tl.min(log_decays, 0) + tl.sum(tl.where(is_before, g[None, :], 0.0), 1)
    ring_weight = tl.where(used[None, :], tl.exp(log_decay[:, None] - log_decays[None, :]), 0.0) * with_ring

    pair = pairs + place * ((4 if SPLIT else 2) * L * K)
    acc = _read_state(state_head, pair, is_kept, K, V, L, BLOCK_K, STAGES, SPLIT, DOT_FORM, INTERPRETED)
    acc *= tl.exp(log_decay)[:, None]
    acc += tl.dot(ring_weight, u_old.to(tl.float32), input_precision=DOT_FORM)
    # Keys: what is missing of v, which the tokens before still change. Queries: the output so far.
    done = tl.where(is_key[:, None], v - acc, acc)
    for j in tl.static_range(NEW):
        u = tl.sum(tl.where((line == j)[:, None], beta[:, None] * done, 0.0), 0)
        since = log_decay - tl.sum(tl.where(line == j, log_decay, 0.0), 0)
        weight = tl.exp(since) * tl.load(dot + ENTRIES + j)
        # A query takes of its own token too.
        taken = tl.where(is_key, tl.where(new > j, -weight, 0.0), tl.where(new >= j, weight, 0.0))
        done += taken[:, None] * u[None, :]

    norm = tl.rsqrt(tl.sum(done * done, 1) / V + norm_eps)[:, None] * norm_in[None, :]
    # Lines of no token hold a gate of zero.
    gated = done * norm * silu(gate_in.to(tl.float32))
    tl.store(out_lines, gated.to(out.dtype.element_ty), mask=is_output)
    is_appended = is_key & live
    u_places = ring_u_base + (length + line)[:, None] * V + value[None, :]
    tl.store(u_places, (beta[:, None] * done).to(ring_u.dtype.element_ty), mask=is_appended[:, None])
    tl.store(log_decay_base + length + line, log_decay.to(ring_log_decay.dtype.element_ty), mask=is_appended)
