"""Chunk attention for long prompts on Hopper: two products in flight while a softmax is computed.

Papers: Shah et al. 2024, FlashAttention-3 (arXiv 2407.08608); Kwon et al. 2023, PagedAttention
(arXiv 2309.06180).

The tiles of triton_prefill.py, written in Gluon for what Triton's language cannot say: the scores
of the next keys and the values of the present ones are both multiplied while the next keys'
softmax is taken. Keys and values come from their pages by asynchronous copies, one tile ahead.

Takes queries and caches in bf16 or fp16, head widths 128 and 256, tiles of 128 rows, compute
capability 9.0.

Legend: `T` tokens, `H` query heads, `h` kv heads, `D` head width.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kiln_nn.kernels.paged_attention.chunks import AttentionChunks

_ROWS, _KEYS, _NUM_WARPS = 128, 64, 8


@gluon.jit
def _ask_for_tile(
    tile,
    cache_ptr,
    page_row_ptr,
    start,
    last,
    kv_head,
    KV_HEADS: gl.constexpr,
    PAGE_TOKENS: gl.constexpr,
    layout: gl.constexpr,
):
    """Copy a tile of keys or values; behind the last one it is read again, so that all are finite."""
    HEAD_DIM: gl.constexpr = tile.shape[1]
    keys = start + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    keys = gl.minimum(keys, last - 1)
    pages = gl.load(page_row_ptr + keys // PAGE_TOKENS).to(gl.int64)
    rows = (pages * PAGE_TOKENS + keys % PAGE_TOKENS) * KV_HEADS + kv_head
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(tile, cache_ptr + (rows * HEAD_DIM)[:, None] + columns[None, :])


@gluon.jit
def _softmax_step(scores, highest, total, start, position, scale, is_masked, layout: gl.constexpr):
    """Weights of one tile's scores, and how much what came before fades. In units of log 2."""
    if is_masked:
        keys = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
        scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    rising = gl.maximum(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - rising[:, None])
    faded = gl.exp2(highest - rising)
    return weights, faded, rising, total * faded + gl.sum(weights, 1)


@gluon.jit(do_not_specialize=["num_tokens", "num_chunks", "table_stride"])
def prefill_hopper_kernel(
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
    scale,
    q_token_stride,
    q_head_stride,
    gate_token_stride,
    gate_head_stride,
    table_stride,
    num_tokens,
    num_chunks,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_BLOCK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_TOKENS: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    HAS_GATE: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    num_warps: gl.constexpr,
):
    FORMAT: gl.constexpr = k_ptr.dtype.element_ty
    TOKENS: gl.constexpr = ROWS // GROUP_BLOCK
    rows_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0]
    )
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    mixed_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, mixed_layout, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)

    kv_head = gl.program_id(0)
    tile = gl.program_id(1)
    in_row = gl.arange(0, GROUP_BLOCK * HEAD_DIM, gl.BlockedLayout([8], [32], [num_warps], [0]))
    in_chunks = gl.load(cu_seqlens_ptr + num_chunks).to(gl.int32)
    for token in range(in_chunks + tile, num_tokens, gl.num_programs(1)):
        places = (kv_head.to(gl.int64) + token * KV_HEADS) * (GROUP * HEAD_DIM) + in_row
        gl.store(out_ptr + places, (in_row * 0).to(FORMAT), mask=in_row < GROUP * HEAD_DIM)
    chunk = gl.load(tile_chunk_ptr + tile).to(gl.int64)
    if chunk < 0:
        return
    first_token = gl.load(cu_seqlens_ptr + chunk).to(gl.int32)
    num_new = gl.load(cu_seqlens_ptr + chunk + 1).to(gl.int32) - first_token
    past = gl.load(context_ptr + chunk).to(gl.int32) - num_new
    start = gl.load(tile_start_ptr + tile).to(gl.int32)
    last = past + gl.minimum(start + TOKENS, num_new)
    table_row = gl.load(table_row_ptr + chunk).to(gl.int64) if HAS_TABLE_ROWS else chunk
    page_row_ptr = page_table_ptr + table_row * table_stride
    # Every row sees the key tiles that end at the tile's first token or before.
    seen_by_all = (past + start + 1) // KEYS * KEYS

    q_tile = gl.allocate_shared_memory(FORMAT, [ROWS, HEAD_DIM], shared)
    k_ring = gl.allocate_shared_memory(FORMAT, [2, KEYS, HEAD_DIM], shared)
    v_ring = gl.allocate_shared_memory(FORMAT, [2, KEYS, HEAD_DIM], shared)
    _ask_for_tile(k_ring.index(0), k_ptr, page_row_ptr, 0, last, kv_head, KV_HEADS, PAGE_TOKENS, rows_layout)
    _ask_for_tile(v_ring.index(0), v_ptr, page_row_ptr, 0, last, kv_head, KV_HEADS, PAGE_TOKENS, rows_layout)
    _ask_for_tile(
        k_ring.index(1), k_ptr, page_row_ptr, KEYS, last, kv_head, KV_HEADS, PAGE_TOKENS, rows_layout
    )
    async_copy.commit_group()

    rows = gl.arange(0, ROWS, gl.SliceLayout(1, rows_layout))
    tokens = start + rows // GROUP_BLOCK
    in_group = rows % GROUP_BLOCK
    is_row = (tokens < num_new) & (in_group < GROUP)
    heads = kv_head * GROUP + in_group
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows_layout))
    q_places = (first_token + tokens).to(gl.int64) * q_token_stride + heads * q_head_stride
    q = gl.load(q_ptr + q_places[:, None] + columns[None, :], mask=is_row[:, None], other=0.0)
    q_tile.store(q)

    position = past + gl.minimum(start + gl.arange(0, ROWS, score_rows) // GROUP_BLOCK, num_new - 1)
    highest = gl.full((ROWS,), -1e30, gl.float32, score_rows)
    total = gl.zeros((ROWS,), gl.float32, score_rows)
    mixed = gl.zeros((ROWS, HEAD_DIM), gl.float32, mixed_layout)
    no_scores = gl.zeros((ROWS, KEYS), gl.float32, scores_layout)

    async_copy.wait_group(0)
    fence_async_shared()
    scores = warpgroup_mma(q_tile, k_ring.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    weights, faded, highest, total = _softmax_step(
        scores, highest, total, 0, position, scale, seen_by_all < KEYS, scores_layout
    )
    weights = gl.convert_layout(weights.to(FORMAT), weights_layout)
    for now in range(0, last - KEYS, KEYS):
        slot = now // KEYS % 2
        following = now + KEYS
        # Here the keys of `following` and the values of `now` have arrived.
        scores_token = warpgroup_mma(
            q_tile, k_ring.index(1 - slot).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        mixed_token = warpgroup_mma(weights, v_ring.index(slot), mixed, is_async=True)
        _ask_for_tile(
            k_ring.index(slot),
            k_ptr,
            page_row_ptr,
            following + KEYS,
            last,
            kv_head,
            KV_HEADS,
            PAGE_TOKENS,
            rows_layout,
        )
        _ask_for_tile(
            v_ring.index(1 - slot),
            v_ptr,
            page_row_ptr,
            following,
            last,
            kv_head,
            KV_HEADS,
            PAGE_TOKENS,
            rows_layout,
        )
        async_copy.commit_group()
        scores = warpgroup_mma_wait(1, deps=[scores_token])
        next_weights, faded, highest, total = _softmax_step(
            scores, highest, total, following, position, scale, seen_by_all < following + KEYS, scores_layout
        )
        mixed, weights = warpgroup_mma_wait(0, deps=[mixed_token, weights])
        weights = gl.convert_layout(next_weights.to(FORMAT), weights_layout)
        mixed = mixed * gl.convert_layout(faded, gl.SliceLayout(1, mixed_layout))[:, None]
        async_copy.wait_group(0)
        fence_async_shared()
    last_slot = (last - 1) // KEYS % 2
    mixed_token = warpgroup_mma(weights, v_ring.index(last_slot), mixed, is_async=True)
    mixed, weights = warpgroup_mma_wait(0, deps=[mixed_token, weights])

    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, mixed_layout))
    q_tile.store((mixed * share[:, None]).to(FORMAT))
    out = q_tile.load(rows_layout)
    if HAS_GATE:
        gate_places = (first_token + tokens).to(gl.int64) * gate_token_stride + heads * gate_head_stride
        gate = gl.load(gate_ptr + gate_places[:, None] + columns[None, :], mask=is_row[:, None], other=0.0)
        out = (out.to(gl.float32) / (1.0 + gl.exp(-gate.to(gl.float32)))).to(FORMAT)
    places = ((first_token + tokens).to(gl.int64) * (KV_HEADS * GROUP) + heads) * HEAD_DIM
    gl.store(out_ptr + places[:, None] + columns[None, :], out, mask=is_row[:, None])


def attend(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_SM: torch.Tensor,
    chunks: AttentionChunks,
    scale: float,
    out_THD: torch.Tensor,
    gate_THD: torch.Tensor | None,
    table_rows_N: torch.Tensor | None,
) -> None:
    """Write the attention of all chunks, for inputs that `overlaps_here` accepts; `scale` is in log 2."""
    num_tokens, num_heads, head_dim = q_THD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    group = num_heads // num_kv_heads
    gate = q_THD if gate_THD is None else gate_THD
    prefill_hopper_kernel[(num_kv_heads, chunks.num_tiles)](
        q_THD,
        k_cache_PShD,
        v_cache_PShD,
        page_table_SM,
        chunks.cu_seqlens_N1 if table_rows_N is None else table_rows_N,
        chunks.cu_seqlens_N1,
        chunks.context_lengths_N,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        gate,
        out_THD,
        scale,
        *q_THD.stride()[:2],
        *gate.stride()[:2],
        page_table_SM.stride(0),
        num_tokens,
        chunks.num_chunks,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        HAS_TABLE_ROWS=table_rows_N is not None,
        HAS_GATE=gate_THD is not None,
        ROWS=_ROWS,
        KEYS=_KEYS,
        num_warps=_NUM_WARPS,
    )
