"""What the state pass needs of each tile, all tiles at once; `triton.py` launches it.

For a tile of 64 tokens with cumulative log-decays `G` (a token's own included) and

    U_ji = beta_i e^(G_i - G_j) (k_i . k_j) for j < i,    R = (I + U)^-1

the corrected values are `u = corrected0 - from_state S` with `corrected0^T = (beta v)^T R` and
`from_state^T = (beta e^G k)^T R`. Everything is kept with time running along the columns: no
product of tensor cores is ever transposed, which Triton up to 3.7 gets wrong on Hopper
(flash-linear-attention issue 640).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import silu, softplus


@triton.jit
def _dot(a, b, FORM: tl.constexpr):
    """`a b` in float32; FORM is "bf16" or the precision of a float32 product."""
    if FORM == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FORM)


@triton.jit
def _convolve_tile(
    mixed, mixed_stride, conv_rows, conv_weight, channels, first, start, token, is_token, read_slot,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of a tile's channels, [64, WIDTH]; zero where there is no token."""
    J: tl.constexpr = W - 1
    y = tl.zeros((64, WIDTH), tl.float32)
    # A tile is small: beyond its first row 32 bits address everything.
    rows = mixed + (first + start) * mixed_stride
    for tap in tl.static_range(W):
        source = token - (J - tap)
        x = tl.load(
            rows + (source[:, None] * mixed_stride + channels[None, :]),
            mask=(is_token & (start + source >= 0))[:, None],
            other=0.0,
        )
        y += x.to(tl.float32) * tl.load(conv_weight + channels * W + tap).to(tl.float32)[None, :]
    if start == 0 and read_slot >= 0:
        tail = conv_rows + read_slot * (J + P) * C
        for tap in tl.static_range(J):
            place = token + tap
            x = tl.load(
                tail + (place[:, None] * C + channels[None, :]),
                mask=(is_token & (place < J))[:, None],
                other=0.0,
            )
            y += x.to(tl.float32) * tl.load(conv_weight + channels * W + tap).to(tl.float32)[None, :]
    return silu(y)


@triton.jit
def _inverse(upper, token, FORM: tl.constexpr):
    """Inverse of I + `upper` (strictly upper triangular, [64, 64]), by blocks of doubled size.

    With `R` the inverses of the diagonal blocks of width s, those of width 2s are
    `R - R (blocks of upper between them) R`: as stable as substitution, also where keys repeat.
    """
    row, column = token[:, None], token[None, :]
    beside = (row % 2 == 0) & (column == row + 1)
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(beside, upper, 0.0)
    for level in tl.static_range(1, 6):
        block_row, block_column = row >> level, column >> level
        beside = (block_row % 2 == 0) & (block_column == block_row + 1)
        between = _dot(tl.where(beside, upper, 0.0), inverse, FORM)
        inverse -= _dot(inverse, between, FORM)
    return inverse


@triton.jit
def _store_ring_keys(ring_keys, k, boundary, length, token, K: tl.constexpr, P: tl.constexpr):
    """Keys of the tokens behind the last boundary; zeros in the ring's entries after them."""
    key = tl.arange(0, K)[None, :]
    entry = token - boundary
    tl.store(ring_keys + (entry[:, None] * K + key), k, mask=((entry >= 0) & (token < length))[:, None])
    is_unused = (token >= length - boundary) & (token < P)
    tl.store(ring_keys + (token[:, None] * K + key), tl.zeros((64, K), tl.float32), mask=is_unused[:, None])


@triton.jit
def _store_ring_decays(ring_row, log_decays, boundary_decay, boundary, length, token, P: tl.constexpr):
    """The same for the log-decays, counted from the boundary."""
    entry = token - boundary
    tl.store(ring_row + entry, log_decays - boundary_decay, mask=(entry >= 0) & (token < length))
    is_unused = (token >= length - boundary) & (token < P)
    tl.store(ring_row + token, tl.zeros((64,), tl.float32), mask=is_unused)


@triton.jit
def delta_tiles_kernel(
    ring_k, ring_log_decay, conv_rows, cu_seqlens, read_slots, live_slots, tile_chunks, tile_starts,
    mixed, a, b, conv_weight, A_log, dt_bias,
    q_tiles, k_tiles, corrected0_tiles, from_state_tiles, scores_tiles, decay_tiles,
    mixed_stride, a_stride, b_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    FORM: tl.constexpr, INVERSE_FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H / HEADS, B): a program computes HEADS value heads of one key head."""
    C: tl.constexpr = 2 * HK * K + H * V
    GROUP: tl.constexpr = H // HK
    first_head = tl.program_id(0) * HEADS
    chunk = tl.load(tile_chunks + tl.program_id(1)).to(tl.int32)
    if chunk < 0:
        return
    start = tl.load(tile_starts + tl.program_id(1)).to(tl.int32)
    first = tl.load(cu_seqlens + chunk).to(tl.int64)
    remaining = (tl.load(cu_seqlens + chunk + 1) - first).to(tl.int32) - start
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    read_slot = tl.load(read_slots + chunk).to(tl.int64)
    live_slot = tl.load(live_slots + chunk).to(tl.int64)
    # Tiles of a chunk follow each other in the scratch; no two chunks share one.
    tile = first // 64 + chunk + start // 64

    key_head = first_head // GROUP
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    token = tl.arange(0, 64)
    is_token = token < length
    square = token[:, None] * 64 + token[None, :]
    q_channels = key_head * K + key
    q = _convolve_tile(
        mixed, mixed_stride, conv_rows, conv_weight, q_channels, first, start, token, is_token, read_slot,
        C, P, W, K,
    )  # fmt: skip
    q *= (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * (K**-0.5))[:, None]
    k = _convolve_tile(
        mixed, mixed_stride, conv_rows, conv_weight, HK * K + q_channels, first, start, token, is_token,
        read_slot, C, P, W, K,
    )  # fmt: skip
    k *= tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]
    boundary = length - length % PAGE
    keeps_ring = (remaining <= 64) & (live_slot >= 0)
    if first_head % GROUP == 0:
        shared = (tile * HK + key_head) * 64 * K
        places = token[:, None] * K + key[None, :]
        tl.store(q_tiles + shared + places, q.to(q_tiles.dtype.element_ty))
        tl.store(k_tiles + shared + places, k.to(k_tiles.dtype.element_ty))
        if keeps_ring:
            ring_keys = ring_k + (live_slot * HK + key_head) * P * K
            _store_ring_keys(ring_keys, k, boundary, length, token, K, P)
    k_by_q = _dot(k, tl.trans(q), FORM)
    k_by_k = _dot(k, tl.trans(k), FORM)

    for offset in tl.range(0, HEADS, num_stages=1):
        head = first_head + offset
        own = tile * H + head
        row = first + start
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        step = tl.load(a + row * a_stride + head + token * a_stride, mask=is_token, other=0.0).to(tl.float32)
        step = -rate * softplus(step + tl.load(dt_bias + head).to(tl.float32))
        strength = tl.load(b + row * b_stride + head + token * b_stride, mask=is_token, other=0.0).to(
            tl.float32
        )
        strength = tl.where(is_token, 1.0 / (1.0 + tl.exp(-strength)), 0.0)
        log_decays = tl.cumsum(tl.where(is_token, step, 0.0), 0)
        boundary_decay = tl.sum(tl.where(token == boundary - 1, log_decays, 0.0), 0)
        since_start = tl.exp(log_decays)
        to_boundary = tl.where(token < boundary, tl.exp(tl.minimum(boundary_decay - log_decays, 0.0)), 0.0)
        decay_row = decay_tiles + own * 192 + token
        tl.store(decay_row, log_decays)
        tl.store(decay_row + 64, since_start)
        tl.store(decay_row + 128, to_boundary)
        if keeps_ring:
            ring_row = ring_log_decay + (live_slot * H + head) * P
            _store_ring_decays(ring_row, log_decays, boundary_decay, boundary, length, token, P)

        # Only differences of later minus earlier are exponentiated: nothing overflows.
        earlier = token[:, None] <= token[None, :]
        decay = tl.exp(tl.where(earlier, log_decays[None, :] - log_decays[:, None], -float("inf")))
        scores = k_by_q * decay
        tl.store(scores_tiles + own * 64 * 64 + square, scores.to(scores_tiles.dtype.element_ty))
        strictly = token[:, None] < token[None, :]
        upper = tl.where(strictly, k_by_k * decay * strength[None, :], 0.0)
        inverse = _inverse(upper, token, INVERSE_FORM) * strength[:, None]
        from_state = _dot(tl.trans(k), inverse * -since_start[:, None], FORM)
        places = key[:, None] * 64 + token[None, :]
        tl.store(from_state_tiles + own * K * 64 + places, from_state.to(from_state_tiles.dtype.element_ty))
        v = _convolve_tile(
            mixed, mixed_stride, conv_rows, conv_weight, 2 * HK * K + head * V + value, first, start, token,
            is_token, read_slot, C, P, W, V,
        )  # fmt: skip
        corrected0 = _dot(tl.trans(v), inverse, FORM)
        places = value[:, None] * 64 + token[None, :]
        tl.store(corrected0_tiles + own * V * 64 + places, corrected0.to(corrected0_tiles.dtype.element_ty))
