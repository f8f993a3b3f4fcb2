"""Backward of the gated delta rule for training; `reference.py` has the algebra.

Four kernels: what the outputs give to the corrected values (all tiles at once), the gradient of the
state from the last tile to the first, then q with the first half of the log-decays' gradient, and
everything else (all tiles at once again). Where a product needs the transpose of another one's result,
that other product is computed a second time with its operands exchanged.

By tile and value head: `state_grads` [V, K], the gradient of the state after the tile;
`decay_grads` [64], of the cumulative log-decays, from the outputs alone. `r` [T, H, V] is the gradient
of the corrected values' right-hand side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_prefill.triton_conv import find_tile
from kiln_nn.kernels.delta_train.triton_forward import (
    column_places,
    dot_add,
    load_rows,
    lower_decay,
    row_places,
    upper_decay,
)


@triton.jit
def corrected_grads_kernel(
    q, k, log_decays, out_grad, corrected_grad, cu_seqlens, tile_documents, tile_starts,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H, B). `P^T do`, which the outputs alone give to the corrected values."""
    head = tl.program_id(0)
    key_head = head // (H // HK)
    _, _, first_row, remaining, tile = find_tile(tile_documents, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    token = tl.arange(0, 64)
    cumulative = tl.load(log_decays + (tile * H + head) * 64 + token)
    q_tile = load_rows(q, first_row, length, key_head, HK, K)
    k_tile = load_rows(k, first_row, length, key_head, HK, K)
    scores = dot_add(k_tile, tl.trans(q_tile), tl.zeros((64, 64), tl.float32), FORM)
    out_grads = load_rows(out_grad, first_row, length, head, H, V)
    grads = dot_add(scores * upper_decay(cumulative), out_grads, tl.zeros((64, V), tl.float32), FORM)
    places = corrected_grad + row_places(first_row, head, tl.arange(0, V), H, V)
    tl.store(places, grads.to(corrected_grad.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit
def state_grads_kernel(
    q, k, beta, inverses, log_decays, out_grad, corrected_grad, state_grads, r, cu_seqlens,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H V / BLOCK_V, N). Carries the state's gradient, transposed, from the last tile to the first."""
    BLOCKS: tl.constexpr = V // BLOCK_V
    head = tl.program_id(0) // BLOCKS
    key_head = head // (H // HK)
    document = tl.program_id(1)
    first = tl.load(cu_seqlens + document).to(tl.int64)
    num_tokens = (tl.load(cu_seqlens + document + 1) - first).to(tl.int32)
    first_tile = first // 64 + document
    num_tiles = (num_tokens + 63) // 64
    key = tl.arange(0, K)
    token = tl.arange(0, 64)
    value = tl.program_id(0) % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    square = token[:, None] * 64 + token[None, :]
    grad = tl.zeros((BLOCK_V, K), tl.float32)
    for step in tl.range(0, num_tiles, num_stages=STAGES):
        index = num_tiles - 1 - step
        first_row = first + index * 64
        own = (first_tile + index) * H + head
        length = num_tokens - index * 64
        is_token = token < length
        q_tile = load_rows(q, first_row, length, key_head, HK, K)
        k_tile = load_rows(k, first_row, length, key_head, HK, K)
        places = column_places(first_row, head, value, H, V)
        out_grads = tl.load(out_grad + places, mask=is_token[None, :], other=0.0).to(tl.float32)
        from_outputs = tl.load(corrected_grad + places, mask=is_token[None, :], other=0.0).to(tl.float32)
        inverse = tl.load(inverses + own * 4096 + square)
        cumulative = tl.load(log_decays + own * 64 + token)
        total = tl.load(log_decays + own * 64 + 63)
        strength = tl.load(beta + (first_row + token) * H + head, mask=is_token, other=0.0)
        tl.store(
            state_grads + own * (V * K) + (value[:, None] * K + key[None, :]),
            grad.to(state_grads.dtype.element_ty),
        )
        since_start = tl.exp(cumulative)
        from_next = dot_add(grad, tl.trans(k_tile), tl.zeros((BLOCK_V, 64), tl.float32), FORM)
        u_grads = from_outputs + from_next * tl.exp(total - cumulative)[None, :]
        right = dot_add(u_grads, tl.trans(inverse), tl.zeros((BLOCK_V, 64), tl.float32), FORM)
        tl.store(r + places, right.to(r.dtype.element_ty), mask=is_token[None, :])
        grad = dot_add(out_grads * since_start[None, :], q_tile, grad * tl.exp(total), FORM)
        grad = dot_add(right * (-strength * since_start)[None, :], k_tile, grad, FORM)


@triton.jit
def query_grads_kernel(
    q, k, corrected, log_decays, states, out_grad, q_grad, decay_grads,
    cu_seqlens, tile_documents, tile_starts,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (HK, B)."""
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    _, _, first_row, remaining, tile = find_tile(tile_documents, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    key = tl.arange(0, K)
    token = tl.arange(0, 64)
    is_token = (token < length)[:, None]
    grads = tl.zeros((64, K), tl.float32)
    for offset in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + offset
        own = tile * H + head
        from_state = tl.zeros((64, K), tl.float32)
        pairs = tl.zeros((64, 64), tl.float32)
        for block in tl.range(0, V // BLOCK_V):
            value = block * BLOCK_V + tl.arange(0, BLOCK_V)
            places = row_places(first_row, head, value, H, V)
            out_grads = tl.load(out_grad + places, mask=is_token, other=0.0)
            u = tl.load(corrected + places, mask=is_token, other=0.0)
            state = tl.load(states + own * (V * K) + (value[:, None] * K + key[None, :]))
            from_state = dot_add(out_grads, state, from_state, FORM)
            pairs = dot_add(out_grads, tl.trans(u), pairs, FORM)
        q_tile = load_rows(q, first_row, length, key_head, HK, K)
        k_tile = load_rows(k, first_row, length, key_head, HK, K)
        cumulative = tl.load(log_decays + own * 64 + token)
        from_state *= tl.exp(cumulative)[:, None]
        pairs *= lower_decay(cumulative)
        decayed = pairs * dot_add(q_tile, tl.trans(k_tile), tl.zeros((64, 64), tl.float32), FORM)
        of_decays = tl.sum(from_state * q_tile.to(tl.float32), 1) + tl.sum(decayed, 1) - tl.sum(decayed, 0)
        tl.store(decay_grads + own * 64 + token, of_decays)
        grads = dot_add(pairs, k_tile, grads + from_state, FORM)
    places = q_grad + row_places(first_row, key_head, key, HK, K)
    tl.store(places, grads.to(q_grad.dtype.element_ty), mask=is_token)


@triton.jit
def key_grads_kernel(
    q, k, v, beta, corrected, log_decays, states, out_grad, state_grads, r, decay_grads,
    k_grad, v_grad, g_grad, beta_grad, cu_seqlens, tile_documents, tile_starts,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (HK, B)."""
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    _, _, first_row, remaining, tile = find_tile(tile_documents, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    key = tl.arange(0, K)
    token = tl.arange(0, 64)
    is_token = (token < length)[:, None]
    grads = tl.zeros((64, K), tl.float32)
    for offset in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + offset
        own = tile * H + head
        rows = (first_row + token) * H + head
        strength = tl.load(beta + rows, mask=token < length, other=0.0)
        from_state = tl.zeros((64, K), tl.float32)
        from_next = tl.zeros((64, K), tl.float32)
        r_by_u = tl.zeros((64, 64), tl.float32)  # row later, column earlier
        u_by_r = tl.zeros((64, 64), tl.float32)  # row earlier, column later
        u_by_out = tl.zeros((64, 64), tl.float32)
        r_by_v = tl.zeros((64,), tl.float32)
        overlap = tl.zeros((K,), tl.float32)
        for block in tl.range(0, V // BLOCK_V):
            value = block * BLOCK_V + tl.arange(0, BLOCK_V)
            places = row_places(first_row, head, value, H, V)
            right = tl.load(r + places, mask=is_token, other=0.0)
            u = tl.load(corrected + places, mask=is_token, other=0.0)
            out_grads = tl.load(out_grad + places, mask=is_token, other=0.0)
            square = own * (V * K) + (value[:, None] * K + key[None, :])
            state = tl.load(states + square)
            next_grad = tl.load(state_grads + square)
            from_state = dot_add(right, state, from_state, FORM)
            from_next = dot_add(u, next_grad, from_next, FORM)
            r_by_u = dot_add(right, tl.trans(u), r_by_u, FORM)
            u_by_r = dot_add(u, tl.trans(right), u_by_r, FORM)
            u_by_out = dot_add(u, tl.trans(out_grads), u_by_out, FORM)
            overlap += tl.sum(state.to(tl.float32) * next_grad.to(tl.float32), 0)
            values = tl.load(v + places, mask=is_token, other=0.0).to(tl.float32)
            r_by_v += tl.sum(right.to(tl.float32) * values, 1)
            of_values = right.to(tl.float32) * strength[:, None]
            tl.store(v_grad + places, of_values.to(v_grad.dtype.element_ty), mask=is_token)

        q_tile = load_rows(q, first_row, length, key_head, HK, K)
        k_tile = load_rows(k, first_row, length, key_head, HK, K)
        k_wide = k_tile.to(tl.float32)
        cumulative = tl.load(log_decays + own * 64 + token)
        total = tl.load(log_decays + own * 64 + 63)
        lower, upper = lower_decay(cumulative), upper_decay(cumulative)
        is_diagonal = token[:, None] == token[None, :]
        from_state *= -tl.exp(cumulative)[:, None]
        from_next *= tl.exp(total - cumulative)[:, None]
        below = tl.where(is_diagonal, 0.0, -r_by_u * lower)
        above = tl.where(is_diagonal, 0.0, -u_by_r * upper)
        of_a = below * dot_add(k_tile, tl.trans(k_tile), tl.zeros((64, 64), tl.float32), FORM)

        of_state = tl.sum(from_state * k_wide, 1)
        of_next = tl.sum(from_next * k_wide, 1)
        tl.store(beta_grad + rows, r_by_v + of_state + tl.sum(of_a, 1), mask=token < length)
        of_a *= strength[:, None]
        of_decays = tl.load(decay_grads + own * 64 + token) + strength * of_state - of_next
        of_decays += tl.sum(of_a, 1) - tl.sum(of_a, 0)
        of_total = tl.sum(of_next, 0) + tl.exp(total) * tl.sum(overlap, 0)
        # Of all log-decays up to a token: the sum over the tokens from there on, the tile's end included.
        after = of_total + tl.sum(of_decays, 0) - tl.cumsum(of_decays, 0) + of_decays
        tl.store(g_grad + rows, after, mask=token < length)

        grads += from_state * strength[:, None] + from_next
        both = below * strength[:, None] + above * strength[None, :]
        grads = dot_add(both, k_tile, grads, FORM)
        grads = dot_add(u_by_out * upper, q_tile, grads, FORM)
    places = k_grad + row_places(first_row, key_head, key, HK, K)
    tl.store(places, grads.to(k_grad.dtype.element_ty), mask=is_token)
