"""Forward of the gated delta rule for training: what a chunk needs, states from chunk to chunk, outputs.

`reference.py` has the algebra; chunks are tiles of 64 tokens, numbered as `find_tile` does. The state
is carried transposed, `S^T` [BLOCK_V, K], with time along the columns: every product takes what was
just computed as its first operand, straight from registers, and reads the second as it was loaded.
No result of a product is ever transposed into an operand, which Triton up to 3.7 gets wrong on Hopper
(flash-linear-attention issue 640).

Inputs lie token by token: q and k [T, h, K], v [T, H, V], g and beta [T, H] in float32. By tile and
value head: `inverses` [64, 64] (the transpose of (I + A)^-1), `log_decays` [64] in float32,
`states` [V, K] before the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_prefill.triton_conv import find_tile


@triton.jit
def dot_add(a, b, c, FORM: tl.constexpr):
    """`a b + c` in float32; FORM is "bf16" or the precision of a float32 product."""
    if FORM == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision=FORM)


@triton.jit
def load_rows(tokens, first_row, length, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """One head's rows `[64, WIDTH]` of a tile; zeros behind its last token."""
    token = tl.arange(0, 64)
    places = tokens + (first_row + token)[:, None] * (HEADS * WIDTH) + head * WIDTH
    places += tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=(token < length)[:, None], other=0.0)


@triton.jit
def row_places(first_row, head, value, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Places of `[64, values]` of one head in memory that lies token by token."""
    return (first_row + tl.arange(0, 64))[:, None] * (HEADS * WIDTH) + (head * WIDTH + value)[None, :]


@triton.jit
def column_places(first_row, head, value, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The same places with time along the columns."""
    return (first_row + tl.arange(0, 64))[None, :] * (HEADS * WIDTH) + (head * WIDTH + value)[:, None]


@triton.jit
def lower_decay(log_decays):
    """`D_ij = e^(G_i - G_j)` for j <= i, zero above: nothing that overflows is exponentiated."""
    token = tl.arange(0, 64)
    differences = log_decays[:, None] - log_decays[None, :]
    return tl.exp(tl.where(token[:, None] >= token[None, :], differences, -float("inf")))


@triton.jit
def upper_decay(log_decays):
    """The transpose of `lower_decay`."""
    token = tl.arange(0, 64)
    differences = log_decays[None, :] - log_decays[:, None]
    return tl.exp(tl.where(token[:, None] <= token[None, :], differences, -float("inf")))


@triton.jit
def train_keys_kernel(
    k, g, beta, inverses, log_decays, cu_seqlens, tile_documents, tile_starts,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (HK, B). Leaves log-decays, and `A^T` in `inverses`, which another kernel inverts in place."""
    GROUP: tl.constexpr = H // HK
    key_head = tl.program_id(0)
    _, _, first_row, remaining, tile = find_tile(tile_documents, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    token = tl.arange(0, 64)
    is_token = token < length
    k_tile = load_rows(k, first_row, length, key_head, HK, K)
    k_by_k = dot_add(k_tile, tl.trans(k_tile), tl.zeros((64, 64), tl.float32), FORM)
    square = token[:, None] * 64 + token[None, :]
    for offset in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + offset
        own = tile * H + head
        rows = (first_row + token) * H + head
        cumulative = tl.cumsum(tl.load(g + rows, mask=is_token, other=0.0), 0)
        strength = tl.load(beta + rows, mask=is_token, other=0.0)
        tl.store(log_decays + own * 64 + token, cumulative)
        upper = k_by_k * upper_decay(cumulative) * strength[None, :]
        upper = tl.where(token[:, None] < token[None, :], upper, 0.0)
        tl.store(inverses + own * 4096 + square, upper.to(inverses.dtype.element_ty))


@triton.jit
def train_pass_kernel(
    k, v, beta, inverses, log_decays, states, corrected, cu_seqlens,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H V / BLOCK_V, N). Leaves the state before every tile, and the corrected values."""
    BLOCKS: tl.constexpr = V // BLOCK_V
    head = tl.program_id(0) // BLOCKS
    key_head = head // (H // HK)
    document = tl.program_id(1)
    first = tl.load(cu_seqlens + document).to(tl.int64)
    num_tokens = (tl.load(cu_seqlens + document + 1) - first).to(tl.int32)
    first_tile = first // 64 + document
    key = tl.arange(0, K)
    token = tl.arange(0, 64)
    value = tl.program_id(0) % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    square = token[:, None] * 64 + token[None, :]
    state = tl.zeros((BLOCK_V, K), tl.float32)
    for index in tl.range(0, (num_tokens + 63) // 64, num_stages=STAGES):
        first_row = first + index * 64
        own = (first_tile + index) * H + head
        length = num_tokens - index * 64
        is_token = token < length
        k_tile = load_rows(k, first_row, length, key_head, HK, K)
        places = column_places(first_row, head, value, H, V)
        v_columns = tl.load(v + places, mask=is_token[None, :], other=0.0).to(tl.float32)
        inverse = tl.load(inverses + own * 4096 + square)
        cumulative = tl.load(log_decays + own * 64 + token)
        total = tl.load(log_decays + own * 64 + 63)
        strength = tl.load(beta + (first_row + token) * H + head, mask=is_token, other=0.0)
        tl.store(
            states + own * (V * K) + (value[:, None] * K + key[None, :]), state.to(states.dtype.element_ty)
        )
        predicted = dot_add(state, tl.trans(k_tile), tl.zeros((BLOCK_V, 64), tl.float32), FORM)
        missing = (v_columns - predicted * tl.exp(cumulative)[None, :]) * strength[None, :]
        u = dot_add(missing, inverse, tl.zeros((BLOCK_V, 64), tl.float32), FORM)
        tl.store(corrected + places, u.to(corrected.dtype.element_ty), mask=is_token[None, :])
        state = dot_add(u * tl.exp(total - cumulative)[None, :], k_tile, state * tl.exp(total), FORM)


@triton.jit
def train_outputs_kernel(
    q, k, corrected, log_decays, states, out, cu_seqlens, tile_documents, tile_starts,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid (H, B)."""
    head = tl.program_id(0)
    key_head = head // (H // HK)
    _, _, first_row, remaining, tile = find_tile(tile_documents, tile_starts, cu_seqlens, tl.program_id(1))
    if remaining <= 0:
        return
    length = tl.minimum(remaining, 64)
    own = tile * H + head
    token = tl.arange(0, 64)
    value = tl.arange(0, V)
    cumulative = tl.load(log_decays + own * 64 + token)
    q_tile = load_rows(q, first_row, length, key_head, HK, K)
    k_tile = load_rows(k, first_row, length, key_head, HK, K)
    scores = dot_add(q_tile, tl.trans(k_tile), tl.zeros((64, 64), tl.float32), FORM)
    state = tl.load(states + own * (V * K) + (value[:, None] * K + tl.arange(0, K)[None, :]))
    o = dot_add(q_tile, tl.trans(state), tl.zeros((64, V), tl.float32), FORM) * tl.exp(cumulative)[:, None]
    u = load_rows(corrected, first_row, length, head, H, V)
    o = dot_add(scores * lower_decay(cumulative), u, o, FORM)
    places = out + row_places(first_row, head, value, H, V)
    tl.store(places, o.to(out.dtype.element_ty), mask=(token < length)[:, None])
