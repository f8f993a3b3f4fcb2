"""The sequential part of the prefill: states from tile to tile, and outputs; `triton.py` launches it.

A program carries `S^T` [BLOCK_V, K] of one value head through one chunk, in float32 registers. With
time along the columns every product takes what it carries as its first operand, straight from
registers, and reads the second from shared memory.

Full tiles that nothing is asked of take the short loop. The last tile, and every tile with a
checkpoint in it, takes the long way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import silu


@triton.jit
def _load(tiles, row, INTERPRETED: tl.constexpr):
    """The block of a descriptor that begins with this row."""
    x = tiles.load([row.to(tl.int32), 0])
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _dot_add(a, b, c, FORM: tl.constexpr):
    """`a b + c` in float32; `b` comes from the scratch, in bf16 if FORM is "bf16"."""
    if FORM == "bf16":
        return tl.dot(a.to(tl.bfloat16), b, c)
    else:
        return tl.dot(a, b.to(tl.float32), c, input_precision=FORM)


@triton.jit
def _tile_outputs(
    state, q_tiles, corrected0_tiles, from_state_tiles, scores_tiles, decay_tiles,
    own, shared, first_value, token,
    K: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Corrected values and outputs of a tile that starts from `state`, both [BLOCK_V, 64]."""
    from_state = _load(from_state_tiles, own * K, INTERPRETED)
    corrected0 = _load(corrected0_tiles, own * V + first_value, INTERPRETED)
    q = _load(q_tiles, shared * 64, INTERPRETED)
    scores = _load(scores_tiles, own * 64, INTERPRETED)
    since_start = tl.load(decay_tiles + own * 256 + 64 + token)
    corrected = _dot_add(state, from_state, corrected0.to(tl.float32), FORM)
    out = _dot_add(state, tl.trans(q), tl.zeros_like(corrected), FORM) * since_start[None, :]
    out = _dot_add(corrected, scores, out, FORM)
    return corrected, out


@triton.jit
def _next_stop(
    checkpoint_slots, first_page, num_pages, tile, last_tile, PAGES: tl.constexpr, SPAN: tl.constexpr
):
    """The next tile, from `tile` on, that takes the long way; looks SPAN tiles ahead."""
    ahead = tl.arange(0, SPAN * PAGES)
    page = tile * PAGES + ahead
    slots = tl.load(checkpoint_slots + first_page + page, mask=page < num_pages, other=-1)
    wanted = tl.min(tl.where(slots >= 0, tile + ahead // PAGES, last_tile), 0)
    return tl.minimum(wanted, tl.minimum(tile + SPAN - 1, last_tile))


@triton.jit
def _store_state(
    state, state_store, slot, head, key, value, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr
):
    places = state_store + (slot * H + head) * K * V + (key[None, :] * V + value[:, None])
    tl.store(places, state.to(state_store.dtype.element_ty))


@triton.jit
def _keep_conv_rows(
    mixed, mixed_stride, conv_rows, first, offset, count, read_slot, slot, channels,
    C: tl.constexpr, P: tl.constexpr, J: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The tail of the boundary `offset` tokens into the chunk, and the `count` rows behind it.

    At the chunk's start the tail is that of `read_slot`.
    """
    row = tl.arange(0, 8)[:, None]
    tokens = mixed + (first + offset) * mixed_stride
    target = conv_rows + slot * (J + P) * C
    channel = channels[None, :]
    if offset > 0:
        tail = tl.load(tokens + ((row - J) * mixed_stride + channel), mask=row < J, other=0.0).to(tl.float32)
    else:
        source = conv_rows + read_slot * (J + P) * C
        tail = tl.load(source + (row * C + channel), mask=(row < J) & (read_slot >= 0), other=0.0).to(
            tl.float32
        )
    tl.store(target + (row * C + channel), tail.to(conv_rows.dtype.element_ty), mask=row < J)
    if count > 0:
        place = tl.arange(0, PAGE)[:, None]
        behind = tl.load(tokens + (place * mixed_stride + channel), mask=place < count, other=0.0).to(
            tl.float32
        )
        tl.store(
            target + ((J + place) * C + channel), behind.to(conv_rows.dtype.element_ty), mask=place < count
        )


@triton.jit
def _keep_all_conv_rows(
    mixed, mixed_stride, conv_rows, first, offset, count, read_slot, slot,
    key_head, value_channels, key, with_keys,
    HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, P: tl.constexpr, J: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Those of a value head's channels, and of its key head's where `with_keys`."""
    _keep_conv_rows(
        mixed, mixed_stride, conv_rows, first, offset, count, read_slot, slot, value_channels, C, P, J, PAGE
    )
    if with_keys:
        for part in tl.static_range(2):
            channels = (part * HK + key_head) * K + key
            _keep_conv_rows(
                mixed, mixed_stride, conv_rows, first, offset, count, read_slot, slot, channels, C, P, J, PAGE
            )


@triton.jit
def _keep_checkpoints(
    state, corrected, k, log_decays, state_store, conv_rows, mixed, mixed_stride, decay_tiles,
    slots, own, first, offset, boundary, read_slot, head, key_head, value, key, token, is_keys_block,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, J: tl.constexpr, PAGE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """States and tails after those of a tile's pages that `slots` asks for; `state` is the one before it."""
    for page in tl.range(0, 64 // PAGE, num_stages=1):
        end = (page + 1) * PAGE
        slot = tl.full((), -1, tl.int64)
        if end <= boundary:
            slot = tl.load(slots + page).to(tl.int64)
        if slot >= 0:
            end_decay = tl.load(decay_tiles + own * 256 + end - 1)
            weight = tl.where(token < end, tl.exp(tl.minimum(end_decay - log_decays, 0.0)), 0.0)
            there = _dot_add(corrected * weight[None, :], k, state * tl.exp(end_decay), FORM)
            _store_state(there, state_store, slot, head, key, value, H, K, V)
            _keep_all_conv_rows(
                mixed, mixed_stride, conv_rows, first, offset + end, 0, read_slot, slot, key_head,
                2 * HK * K + head * V + value, key, is_keys_block, HK, K, C, P, J, PAGE,
            )  # fmt: skip


@triton.jit
def _store_ring_values(
    ring_rows, corrected, boundary, length, value, token, V: tl.constexpr, P: tl.constexpr
):
    """Corrected values of the tokens behind the last boundary; zeros in the ring's entries after them."""
    entry = token - boundary
    is_kept = (entry >= 0) & (token < length)
    tl.store(ring_rows + (entry[None, :] * V + value[:, None]), corrected, mask=is_kept[None, :])
    is_unused = (token >= length - boundary) & (token < P)
    zeros = tl.zeros_like(corrected)
    tl.store(ring_rows + (token[None, :] * V + value[:, None]), zeros, mask=is_unused[None, :])


@triton.jit
def delta_pass_kernel(
    state_store, ring_u, conv_rows, cu_seqlens, read_slots, live_slots, cu_pages, checkpoint_slots, mixed,
    q_tiles, k_tiles, corrected0_tiles, from_state_tiles, scores_tiles, decay_tiles, out, mixed_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_V: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (H V / BLOCK_V, N). Leaves the outputs before their norm in `out` [T, H, V]."""
    BLOCKS: tl.constexpr = V // BLOCK_V
    GROUP: tl.constexpr = H // HK
    C: tl.constexpr = 2 * HK * K + H * V
    J: tl.constexpr = W - 1
    PAGES: tl.constexpr = 64 // PAGE
    head = tl.program_id(0) // BLOCKS
    value_block = tl.program_id(0) % BLOCKS
    key_head = head // GROUP
    chunk = tl.program_id(1)
    first = tl.load(cu_seqlens + chunk).to(tl.int64)
    num_tokens = (tl.load(cu_seqlens + chunk + 1) - first).to(tl.int32)
    if num_tokens <= 0:
        return
    read_slot = tl.load(read_slots + chunk).to(tl.int64)
    live_slot = tl.load(live_slots + chunk).to(tl.int64)
    first_page = tl.load(cu_pages + chunk).to(tl.int64)
    num_pages = (tl.load(cu_pages + chunk + 1) - first_page).to(tl.int32)
    first_tile = first // 64 + chunk
    last_tile = (num_tokens - 1) // 64

    key = tl.arange(0, K)
    first_value = value_block * BLOCK_V
    value = first_value + tl.arange(0, BLOCK_V)
    token = tl.arange(0, 64)
    out_places = token[None, :] * (H * V) + value[:, None]
    is_keys_block = (head % GROUP == 0) & (value_block == 0)
    state = tl.zeros((BLOCK_V, K), tl.float32)
    if read_slot >= 0:
        places = state_store + (read_slot * H + head) * K * V + (key[None, :] * V + value[:, None])
        state = tl.load(places).to(tl.float32)

    tile = last_tile * 0
    while tile <= last_tile:
        stop = _next_stop(checkpoint_slots, first_page, num_pages, tile, last_tile, PAGES, SPAN)
        # A short tile decays by its last token; the next one's is fetched ahead.
        total = tl.load(decay_tiles + ((first_tile + tile) * H + head) * 256 + 127)
        for full_tile in tl.range(tile, stop, num_stages=STAGES):
            own = (first_tile + full_tile) * H + head
            shared = (first_tile + full_tile) * HK + key_head
            corrected, o = _tile_outputs(
                state, q_tiles, corrected0_tiles, from_state_tiles, scores_tiles, decay_tiles,
                own, shared, first_value, token, K, V, FORM, INTERPRETED,
            )  # fmt: skip
            k = _load(k_tiles, shared * 64, INTERPRETED)
            to_end = tl.load(decay_tiles + own * 256 + 128 + token)
            rows = out + (first + full_tile * 64) * (H * V) + head * V
            tl.store(rows + out_places, o.to(out.dtype.element_ty))
            state = _dot_add(corrected * to_end[None, :], k, state * total, FORM)
            total = tl.load(decay_tiles + (own + H) * 256 + 127)

        own = (first_tile + stop) * H + head
        shared = (first_tile + stop) * HK + key_head
        length = tl.minimum(num_tokens - stop * 64, 64)
        corrected, o = _tile_outputs(
            state, q_tiles, corrected0_tiles, from_state_tiles, scores_tiles, decay_tiles,
            own, shared, first_value, token, K, V, FORM, INTERPRETED,
        )  # fmt: skip
        rows = out + (first + stop * 64) * (H * V) + head * V
        tl.store(rows + out_places, o.to(out.dtype.element_ty), mask=(token < length)[None, :])
        k = _load(k_tiles, shared * 64, INTERPRETED)
        log_decays = tl.load(decay_tiles + own * 256 + token)
        boundary = length - length % PAGE
        _keep_checkpoints(
            state, corrected, k, log_decays, state_store, conv_rows, mixed, mixed_stride, decay_tiles,
            checkpoint_slots + first_page + stop * PAGES, own, first, stop * 64, boundary, read_slot,
            head, key_head, value, key, token, is_keys_block, H, HK, K, V, C, P, J, PAGE, FORM,
        )  # fmt: skip
        if stop == last_tile and live_slot >= 0:
            ring_rows = ring_u + (live_slot * H + head) * P * V
            _store_ring_values(ring_rows, corrected, boundary, length, value, token, V, P)
            _keep_all_conv_rows(
                mixed, mixed_stride, conv_rows, first, stop * 64 + boundary, length - boundary, read_slot,
                live_slot, key_head, 2 * HK * K + head * V + value, key, is_keys_block,
                HK, K, C, P, J, PAGE,
            )  # fmt: skip
        if boundary > 0:
            to_boundary = tl.load(decay_tiles + own * 256 + 128 + token)
            total = tl.load(decay_tiles + own * 256 + 64 + boundary - 1)
            state = _dot_add(corrected * to_boundary[None, :], k, state * total, FORM)
        tile = stop + 1
    if live_slot >= 0:
        _store_state(state, state_store, live_slot, head, key, value, H, K, V)


@triton.jit
def delta_norm_kernel(
    out, z, norm_weight, cu_seqlens, z_stride, norm_eps, num_rows, num_chunks,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gated norm in place, ROWS of the T H rows of `out`; those of no chunk become zero."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.arange(0, V)
    num_used = tl.load(cu_seqlens + num_chunks).to(tl.int64) * H
    places = row.to(tl.int64)[:, None] * V + value[None, :]
    is_used = (row < num_used)[:, None]
    o = tl.load(out + places, mask=is_used, other=0.0).to(tl.float32)
    gates = z + (row // H).to(tl.int64)[:, None] * z_stride + ((row % H) * V)[:, None] + value[None, :]
    gate = silu(tl.load(gates, mask=is_used, other=0.0).to(tl.float32))
    scale = tl.rsqrt(tl.sum(o * o, 1) / V + norm_eps)
    normed = o * scale[:, None] * tl.load(norm_weight + value).to(tl.float32)[None, :] * gate
    tl.store(out + places, normed.to(out.dtype.element_ty), mask=(row < num_rows)[:, None])
