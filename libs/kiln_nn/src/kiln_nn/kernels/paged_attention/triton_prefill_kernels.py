"""The device side of chunk attention: one part of a query tile's context, and the join of the parts.

triton_prefill.py says what they take and how launches are cut.

Legend: `T` tokens, `H` query heads, `h` kv heads, `D` head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.paged_attention.triton_decode_kernels import unpack_fp8


@triton.jit
def _part_of_tile(end, part, num_parts, LEAST: tl.constexpr, KEYS: tl.constexpr):
    """First and last key (exclusive) of one part of a tile that sees `end` keys; whole key tiles."""
    length = tl.maximum(tl.cdiv(tl.cdiv(end, num_parts), KEYS) * KEYS, LEAST)
    first = part * length
    return first, tl.minimum(first + length, end)


@triton.jit
def _attend(
    q,
    mixed,
    odd,
    total,
    highest,
    k_ptr,
    v_ptr,
    page_row_ptr,
    kv_head,
    first,
    last,
    position,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Take keys `first` to `last` into the weighted values, their total weight and highest score.

    Scores are in units of log 2. Unmasked, these are whole key tiles that every row sees. Paired
    are values in fp8 (see `unpack_fp8`): `mixed` are then the even columns, `odd` the others.
    """
    columns = tl.arange(0, HEAD_DIM)
    pairs = tl.arange(0, HEAD_DIM // 2)
    in_tile = tl.arange(0, KEYS)
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        keys = start + in_tile
        is_key = keys < last
        mask = is_key[:, None] if MASKED else None
        other = 0.0 if MASKED else None
        pages = tl.load(
            page_row_ptr + keys // PAGE_TOKENS, mask=is_key if MASKED else None, other=0 if MASKED else None
        )
        slots = (pages.to(tl.int64) * PAGE_TOKENS + keys % PAGE_TOKENS) * KV_HEADS + kv_head
        places = slots[:, None] * HEAD_DIM + columns[None, :]
        k = tl.load(k_ptr + places, mask=mask, other=other)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - rising[:, None])
        faded = tl.exp2(highest - rising)
        total = total * faded + tl.sum(weights, 1)
        weights = weights.to(q.dtype)
        mixed = mixed * faded[:, None]
        if PAIRED:
            v_places = slots[:, None] * (HEAD_DIM // 2) + pairs[None, :]
            v_even, v_odd = unpack_fp8(tl.load(v_ptr + v_places, mask=mask, other=0 if MASKED else None))
            mixed = tl.dot(weights, v_even, mixed)
            odd = tl.dot(weights, v_odd, odd * faded[:, None])
        else:
            v = tl.load(v_ptr + places, mask=mask, other=other).to(q.dtype)
            mixed = tl.dot(weights, v, mixed, input_precision=PRECISION)
        highest = rising
    return mixed, odd, total, highest


@triton.jit
def _zero_tokens_of_no_chunk(
    out_ptr, first, num_tokens, kv_head, stride, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    for token in range(first, num_tokens, stride):
        places = (kv_head.to(tl.int64) + token * tl.num_programs(0)) * ROW + columns
        tl.store(out_ptr + places, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=columns < ROW)


@triton.jit(
    do_not_specialize=["num_tokens", "num_chunks", "num_parts", "table_stride"],
)
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    table_row_ptr,
    cu_seqlens_ptr,
    context_ptr,
    tile_chunk_ptr,
    tile_start_ptr,
    gate_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    scale,
    q_token_stride,
    q_head_stride,
    gate_token_stride,
    gate_head_stride,
    table_stride,
    num_tokens,
    num_chunks,
    num_parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    IS_JOINED_LATER: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    FORMAT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_FREE_LOOP: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    part = tl.program_id(2)
    chunk = tl.load(tile_chunk_ptr + tile).to(tl.int64)
    if part == 0:
        in_chunks = tl.load(cu_seqlens_ptr + num_chunks).to(tl.int32)
        _zero_tokens_of_no_chunk(
            out_ptr,
            in_chunks + tile,
            num_tokens,
            kv_head,
            tl.num_programs(1),
            GROUP * HEAD_DIM,
            GROUP_BLOCK * HEAD_DIM,
        )
    if chunk < 0:
        return
    first_token = tl.load(cu_seqlens_ptr + chunk).to(tl.int32)
    num_new = tl.load(cu_seqlens_ptr + chunk + 1).to(tl.int32) - first_token
    past = tl.load(context_ptr + chunk).to(tl.int32) - num_new
    start = tl.load(tile_start_ptr + tile).to(tl.int32)
    end = past + tl.minimum(start + TOKENS, num_new)
    first, last = _part_of_tile(end, part, num_parts, LEAST, KEYS)
    if first >= end:
        return
    table_row = tl.load(table_row_ptr + chunk).to(tl.int64) if HAS_TABLE_ROWS else chunk
    page_row_ptr = page_table_ptr + table_row * table_stride
    rows = tl.arange(0, TOKENS * GROUP_BLOCK)
    tokens = start + rows // GROUP_BLOCK
    in_group = rows % GROUP_BLOCK
    is_row = (tokens < num_new) & (in_group < GROUP)
    position = past + tl.minimum(tokens, num_new - 1)
    heads = kv_head * GROUP + in_group
    columns = tl.arange(0, HEAD_DIM)
    q_rows = (first_token + tokens).to(tl.int64)
    q_places = q_rows * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_places[:, None] + columns[None, :], mask=is_row[:, None], other=0.0).to(FORMAT)
    highest = tl.full((TOKENS * GROUP_BLOCK,), -1e30, tl.float32)
    total = tl.zeros((TOKENS * GROUP_BLOCK,), tl.float32)
    mixed = tl.zeros((TOKENS * GROUP_BLOCK, HEAD_DIM // 2 if PAIRED else HEAD_DIM), tl.float32)
    odd = tl.zeros((TOKENS * GROUP_BLOCK, HEAD_DIM // 2), tl.float32)
    seen_by_all = first
    if HAS_FREE_LOOP:
        # Every row sees the key tiles that end at the tile's first token or before.
        seen_by_all = tl.minimum(tl.maximum((past + start + 1) // KEYS * KEYS, first), last)
        mixed, odd, total, highest = _attend(
            q,
            mixed,
            odd,
            total,
            highest,
            k_ptr,
            v_ptr,
            page_row_ptr,
            kv_head,
            first,
            seen_by_all,
            position,
            scale,
            KV_HEADS,
            HEAD_DIM,
            PAGE_TOKENS,
            KEYS,
            False,
            PRECISION,
            STAGES,
            PAIRED,
        )
    mixed, odd, total, highest = _attend(
        q,
        mixed,
        odd,
        total,
        highest,
        k_ptr,
        v_ptr,
        page_row_ptr,
        kv_head,
        seen_by_all,
        last,
        position,
        scale,
        KV_HEADS,
        HEAD_DIM,
        PAGE_TOKENS,
        KEYS,
        True,
        PRECISION,
        STAGES,
        PAIRED,
    )
    if PAIRED:
        mixed = tl.reshape(tl.join(mixed, odd), (TOKENS * GROUP_BLOCK, HEAD_DIM))
    # A part may hold nothing that a row sees: its total is zero and so is its share.
    out = mixed / tl.maximum(total, 1e-30)[:, None]
    out_rows = q_rows * (KV_HEADS * GROUP) + heads
    if IS_JOINED_LATER:
        entries = out_rows * num_parts + part
        places = entries[:, None] * HEAD_DIM + columns[None, :]
        tl.store(part_out_ptr + places, out, mask=is_row[:, None])
        tl.store(part_lse_ptr + entries, highest + tl.log2(total), mask=is_row)
    else:
        if HAS_GATE:
            gate_places = q_rows * gate_token_stride + heads * gate_head_stride
            gate = tl.load(
                gate_ptr + gate_places[:, None] + columns[None, :], mask=is_row[:, None], other=0.0
            )
            out *= tl.sigmoid(gate.to(tl.float32))
        places = out_rows[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_parts"])
def join_tiles_kernel(
    part_out_ptr,
    part_lse_ptr,
    cu_seqlens_ptr,
    context_ptr,
    tile_chunk_ptr,
    tile_start_ptr,
    gate_ptr,
    out_ptr,
    gate_token_stride,
    gate_head_stride,
    num_parts,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """Weigh the parts of one token and head by their share of the softmax, and gate the sum."""
    head = tl.program_id(0)
    tile = tl.program_id(1) // TOKENS
    chunk = tl.load(tile_chunk_ptr + tile).to(tl.int64)
    if chunk < 0:
        return
    first_token = tl.load(cu_seqlens_ptr + chunk).to(tl.int32)
    num_new = tl.load(cu_seqlens_ptr + chunk + 1).to(tl.int32) - first_token
    past = tl.load(context_ptr + chunk).to(tl.int32) - num_new
    start = tl.load(tile_start_ptr + tile).to(tl.int32)
    token = start + tl.program_id(1) % TOKENS
    if token >= num_new:
        return
    parts = tl.arange(0, PARTS_BLOCK)
    end = past + tl.minimum(start + TOKENS, num_new)
    first, _ = _part_of_tile(end, parts, num_parts, LEAST, KEYS)
    is_part = (parts < num_parts) & (first < end)
    columns = tl.arange(0, HEAD_DIM)
    row = (first_token + token).to(tl.int64)
    entries = (row * HEADS + head) * num_parts + parts
    lse = tl.load(part_lse_ptr + entries, mask=is_part, other=float("-inf"))
    share = tl.exp2(lse - tl.max(lse, 0))
    share = share / tl.sum(share, 0)
    part_out = tl.load(
        part_out_ptr + entries[:, None] * HEAD_DIM + columns[None, :], mask=is_part[:, None], other=0.0
    )
    out = tl.sum(part_out * share[:, None], 0)
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gate_token_stride + head * gate_head_stride + columns)
        out *= tl.sigmoid(gate.to(tl.float32))
    tl.store(out_ptr + (row * HEADS + head) * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty))
