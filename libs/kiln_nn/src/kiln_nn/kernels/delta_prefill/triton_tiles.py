"""What the state pass needs of each tile, all tiles at once; `triton.py` launches it.

For a tile of 64 tokens with cumulative log-decays `G` (a token's own included) and

    U_ji = beta_i e^(G_i - G_j) (k_i . k_j) for j < i,    R = (I + U)^-1

the corrected values are `u = corrected0 + from_state S` with `corrected0^T = (beta v)^T R` and
`from_state^T = -(beta e^G k)^T R`. Everything is kept with time running along the columns: no
product of tensor cores is ever transposed, which Triton up to 3.7 gets wrong on Hopper
(flash-linear-attention issue 640).

Three kernels: keys (gates, scores and U), inverses, values (the two products). The inverses have
a kernel to themselves because products of 16 x 16 blocks want programs of one warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import softplus
from kiln_nn.kernels.delta_prefill.triton_conv import find_tile


@triton.jit
def _dot(a, b, FORM: tl.constexpr):
    """`a b` in float32; FORM is "bf16" or the precision of a float32 product."""
    if FORM == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FORM)


@triton.jit
def _store_ring_keys(ring_keys, k, boundary, length, token, K: tl.constexpr, P: tl.constexpr):
    """Keys of the tokens behind the last boundary; zeros in the ring's entries after them."""
    key = tl.arange(0, K)[None, :]
    entry = token - boundary
    is_kept = (entry >= 0) & (token < length)
    tl.store(ring_keys + (entry[:, None] * K + key), k, mask=is_kept[:, None])
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
def delta_keys_kernel(
    ring_k, ring_log_decay, cu_seqlens, live_slots, tile_chunks, tile_starts, a, b, A_log, dt_bias,
    q_tiles, k_tiles, scores_tiles, inverse_tiles, decay_tiles, a_stride, b_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, PAGE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (HK, B). Leaves U in `inverse_tiles`, for the next kernel to invert in place."""
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    chunk, _, first_row, remaining, tile = find_tile(tile_chunks, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    live_slot = tl.load(live_slots + chunk).to(tl.int64)

    key = tl.arange(0, K)
    token = tl.arange(0, 64)
    is_token = token < length
    places = (tile * HK + key_head) * 64 * K + (token[:, None] * K + key[None, :])
    k = tl.load(k_tiles + places)
    k_by_k = _dot(k, tl.trans(k), FORM)
    k_by_q = _dot(k, tl.trans(tl.load(q_tiles + places)), FORM)
    boundary = length - length % PAGE
    keeps_ring = (remaining <= 64) & (live_slot >= 0)
    if keeps_ring:
        ring_keys = ring_k + (live_slot * HK + key_head) * P * K
        _store_ring_keys(ring_keys, k.to(tl.float32), boundary, length, token, K, P)

    square = token[:, None] * 64 + token[None, :]
    for offset in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + offset
        own = tile * H + head
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        step = tl.load(a + first_row * a_stride + head + token * a_stride, mask=is_token, other=0.0)
        step = -rate * softplus(step.to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
        strength = tl.load(b + first_row * b_stride + head + token * b_stride, mask=is_token, other=0.0)
        strength = tl.where(is_token, 1.0 / (1.0 + tl.exp(-strength.to(tl.float32))), 0.0)
        log_decays = tl.cumsum(tl.where(is_token, step, 0.0), 0)
        boundary_decay = tl.sum(tl.where(token == boundary - 1, log_decays, 0.0), 0)
        decay_row = decay_tiles + own * 256 + token
        tl.store(decay_row, log_decays)
        tl.store(decay_row + 64, tl.exp(log_decays))
        to_boundary = tl.exp(tl.minimum(boundary_decay - log_decays, 0.0))
        tl.store(decay_row + 128, tl.where(token < boundary, to_boundary, 0.0))
        tl.store(decay_row + 192, strength)
        if keeps_ring:
            ring_row = ring_log_decay + (live_slot * H + head) * P
            _store_ring_decays(ring_row, log_decays, boundary_decay, boundary, length, token, P)

        # Only differences of later minus earlier are exponentiated: nothing overflows.
        not_later = token[:, None] <= token[None, :]
        decay = tl.exp(tl.where(not_later, log_decays[None, :] - log_decays[:, None], -float("inf")))
        scores = k_by_q * decay
        tl.store(scores_tiles + own * 4096 + square, scores.to(scores_tiles.dtype.element_ty))
        earlier = token[:, None] < token[None, :]
        upper = tl.where(earlier, k_by_k * decay * strength[None, :], 0.0)
        tl.store(inverse_tiles + own * 4096 + square, upper.to(inverse_tiles.dtype.element_ty))


@triton.jit
def _block(upper, row: tl.constexpr, column: tl.constexpr):
    """Block (row, column) of 16 x 16 in float32, and where it lies."""
    i = tl.arange(0, 16)
    places = upper + (row * 1024 + column * 16) + (i[:, None] * 64 + i[None, :])
    return tl.load(places).to(tl.float32)


@triton.jit
def _store_block(upper, row: tl.constexpr, column: tl.constexpr, block):
    i = tl.arange(0, 16)
    places = upper + (row * 1024 + column * 16) + (i[:, None] * 64 + i[None, :])
    tl.store(places, block.to(upper.dtype.element_ty))


@triton.jit
def _small_inverse(upper, FORM: tl.constexpr):
    """Inverse of I + `upper` (strictly upper triangular, [16, 16]), by blocks of doubled size.

    With `R` the inverses of the diagonal blocks of width s, those of width 2s are
    `R - R (blocks of upper between them) R`: as stable as substitution, also where keys repeat.
    """
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    beside = (row % 2 == 0) & (column == row + 1)
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(beside, upper, 0.0)
    for level in tl.static_range(1, 4):
        block_row, block_column = row >> level, column >> level
        beside = (block_row % 2 == 0) & (block_column == block_row + 1)
        between = _dot(tl.where(beside, upper, 0.0), inverse, FORM)
        inverse -= _dot(inverse, between, FORM)
    return inverse


@triton.jit
def delta_inverses_kernel(
    inverse_tiles, cu_seqlens, tile_chunks, tile_starts, H: tl.constexpr, FORM: tl.constexpr
):
    """Grid (H, B). Turns U into the inverse of I + U, in blocks of 16; those below stay as they are."""
    _, _, _, remaining, tile = find_tile(tile_chunks, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    upper = inverse_tiles + (tile * H + tl.program_id(0)) * 4096
    u01, u12, u23 = _block(upper, 0, 1), _block(upper, 1, 2), _block(upper, 2, 3)
    r0 = _small_inverse(_block(upper, 0, 0), FORM)
    r1 = _small_inverse(_block(upper, 1, 1), FORM)
    r2 = _small_inverse(_block(upper, 2, 2), FORM)
    r3 = _small_inverse(_block(upper, 3, 3), FORM)
    r01 = -_dot(r0, _dot(u01, r1, FORM), FORM)
    r12 = -_dot(r1, _dot(u12, r2, FORM), FORM)
    r23 = -_dot(r2, _dot(u23, r3, FORM), FORM)
    u02, u13, u03 = _block(upper, 0, 2), _block(upper, 1, 3), _block(upper, 0, 3)
    r02 = -_dot(r0, _dot(u01, r12, FORM) + _dot(u02, r2, FORM), FORM)
    r13 = -_dot(r1, _dot(u12, r23, FORM) + _dot(u13, r3, FORM), FORM)
    r03 = -_dot(r0, _dot(u01, r13, FORM) + _dot(u02, r23, FORM) + _dot(u03, r3, FORM), FORM)
    _store_block(upper, 0, 0, r0)
    _store_block(upper, 1, 1, r1)
    _store_block(upper, 2, 2, r2)
    _store_block(upper, 3, 3, r3)
    _store_block(upper, 0, 1, r01)
    _store_block(upper, 1, 2, r12)
    _store_block(upper, 2, 3, r23)
    _store_block(upper, 0, 2, r02)
    _store_block(upper, 1, 3, r13)
    _store_block(upper, 0, 3, r03)


@triton.jit
def delta_values_kernel(
    cu_seqlens, tile_chunks, tile_starts,
    k_tiles, v_tiles, corrected0_tiles, from_state_tiles, inverse_tiles, decay_tiles,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H, B)."""
    head = tl.program_id(0)
    _, _, _, remaining, tile = find_tile(tile_chunks, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    own = tile * H + head
    shared = tile * HK + head // (H // HK)
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    token = tl.arange(0, 64)
    inverse = tl.load(inverse_tiles + own * 4096 + (token[:, None] * 64 + token[None, :])).to(tl.float32)
    strength = tl.load(decay_tiles + own * 256 + 192 + token)
    since_start = tl.load(decay_tiles + own * 256 + 64 + token)
    inverse = tl.where(token[:, None] <= token[None, :], inverse * strength[:, None], 0.0)
    k = tl.load(k_tiles + shared * 64 * K + (token[:, None] * K + key[None, :]))
    v = tl.load(v_tiles + own * 64 * V + (token[:, None] * V + value[None, :]))
    from_state = _dot(tl.trans(k), inverse * -since_start[:, None], FORM)
    places = from_state_tiles + own * K * 64 + (key[:, None] * 64 + token[None, :])
    tl.store(places, from_state.to(from_state_tiles.dtype.element_ty))
    corrected0 = _dot(tl.trans(v), inverse, FORM)
    places = corrected0_tiles + own * V * 64 + (value[:, None] * 64 + token[None, :])
    tl.store(places, corrected0.to(corrected0_tiles.dtype.element_ty))
