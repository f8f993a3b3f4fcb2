"""Attention of prompt chunks over KV pages in Triton: tiles of query tokens, causal, with a past.

Papers: Dao 2023, FlashAttention-2 (arXiv 2307.08691); Kwon et al. 2023, PagedAttention (arXiv
2309.06180); Dao et al. 2023, Flash-Decoding.

Takes head widths 64, 128 and 256, up to 16 query heads per kv head, pages of a power of two of
tokens (at most 64), queries in bf16 or fp16 and a cache in the same format or in fp8 (e4m3,
compute capability 8.9 and newer, unit scale); float32 for tiles of up to 16 rows. With an fp8
cache products are taken in fp16, which holds every e4m3 number and converts in one instruction.

One program does one tile of tokens for all query heads of one kv head, so that keys and values
are read once for them: 32 tokens x 4 heads are the 128 rows of a Hopper tile. What every row sees
runs without a mask. Few tiles are not enough programs: then each tile's context is cut in parts,
which a second launch joins. The grid depends on the number of tiles alone. What lies behind a
context is never read; tokens of no chunk get zeros.

Legend: `T` tokens, `S` table rows, `M` pages of the longest sequence, `H` query heads, `h` kv
heads, `D` head width, `N` chunks, `B` query tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dispatch import device_limits, is_interpreted
from kiln_nn.kernels.paged_attention.chunks import AttentionChunks
from kiln_nn.kernels.paged_attention.triton_decode import LOG2_E, product_format, takes_cache

_MOST_FLOAT32_ROWS = 16
_MOST_ROWS = 512
_MOST_PARTS = 16
_LEAST_PART_TOKENS = 256
_HOPPER_SHARED_BYTES = 200 * 1024


@dataclass(frozen=True)
class PrefillConfig:
    """How a launch is cut: keys per tile, parts of a context, and how much is loaded ahead.

    Page numbers are loaded before what they point to, so every tile loaded ahead costs two stages.
    """

    tile_keys: int
    num_parts: int
    num_warps: int
    num_stages: int


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
):
    """Take keys `first` to `last` into the weighted values, their total weight and highest score.

    Scores are in units of log 2. Unmasked, these are whole key tiles that every row sees.
    """
    columns = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, KEYS)
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        keys = start + in_tile
        if MASKED:
            is_key = keys < last
            pages = tl.load(page_row_ptr + keys // PAGE_TOKENS, mask=is_key, other=0)
        else:
            pages = tl.load(page_row_ptr + keys // PAGE_TOKENS)
        slots = (pages.to(tl.int64) * PAGE_TOKENS + keys % PAGE_TOKENS) * KV_HEADS + kv_head
        places = slots[:, None] * HEAD_DIM + columns[None, :]
        if MASKED:
            k = tl.load(k_ptr + places, mask=is_key[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + places)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - rising[:, None])
        faded = tl.exp2(highest - rising)
        if MASKED:
            v = tl.load(v_ptr + places, mask=is_key[:, None], other=0.0)
        else:
            v = tl.load(v_ptr + places)
        total = total * faded + tl.sum(weights, 1)
        mixed = mixed * faded[:, None]
        mixed = tl.dot(weights.to(q.dtype), v.to(q.dtype), mixed, input_precision=PRECISION)
        highest = rising
    return mixed, total, highest


@triton.jit
def _zero_tokens_of_no_chunk(
    out_ptr, first, num_tokens, kv_head, stride, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    for token in range(first, num_tokens, stride):
        places = (token.to(tl.int64) * tl.num_programs(0) + kv_head) * ROW + columns
        tl.store(out_ptr + places, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=columns < ROW)


@triton.jit(
    do_not_specialize=["num_tokens", "num_chunks", "num_parts", "table_stride"],
)
def _prefill_kernel(
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
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_row_ptr + chunk).to(tl.int64)
    else:
        table_row = chunk
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
    mixed = tl.zeros((TOKENS * GROUP_BLOCK, HEAD_DIM), tl.float32)
    # Every row sees the key tiles that end at the tile's first token or before.
    seen_by_all = tl.minimum(tl.maximum((past + start + 1) // KEYS * KEYS, first), last)
    mixed, total, highest = _attend(
        q,
        mixed,
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
    )
    mixed, total, highest = _attend(
        q,
        mixed,
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
    )
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
def _join_tiles_kernel(
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


def takes(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    gate_THD: torch.Tensor | None,
    chunks: AttentionChunks,
) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    rows = chunks.tile_tokens * triton.next_power_of_2(q_THD.shape[1] // k_cache_PShD.shape[2])
    most_rows = _MOST_FLOAT32_ROWS if q_THD.dtype is torch.float32 and not is_interpreted() else _MOST_ROWS
    return (
        takes_cache(q_THD, k_cache_PShD, v_cache_PShD)
        and chunks.num_tiles > 0
        and rows <= most_rows
        and (gate_THD is None or gate_THD.stride(2) == 1)
    )


def choose_config(rows: int, num_programs: int, q_dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """Cut a launch of tiles of `rows` rows so that the GPU is full; depends on shapes only."""
    limits = device_limits(device)
    programs_each = 1 if rows >= 128 else 2
    wanted = triton.cdiv(programs_each * limits.num_multiprocessors, num_programs)
    num_parts = min(_MOST_PARTS, triton.next_power_of_2(wanted))
    if rows <= 32:  # a decode pass with drafts: bound by memory, as in triton_decode
        num_parts = max(4, num_parts)
    if q_dtype is torch.float32:  # no tensor cores: the tiles live in registers
        return PrefillConfig(16, num_parts, num_warps=4, num_stages=1)
    if rows <= 32:
        return PrefillConfig(32, num_parts, num_warps=4, num_stages=5)
    is_hopper = limits.shared_memory_bytes >= _HOPPER_SHARED_BYTES
    num_warps = 8 if rows >= 128 else 4
    return PrefillConfig(64 if is_hopper else 32, num_parts, num_warps, num_stages=5 if is_hopper else 3)


def paged_chunk_attention(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_SM: torch.Tensor,
    chunks: AttentionChunks,
    scale: float,
    *,
    gate_THD: torch.Tensor | None = None,
    table_rows_N: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    num_tokens, num_heads, head_dim = q_THD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    group = num_heads // num_kv_heads
    group_block = triton.next_power_of_2(group)
    rows, num_programs = chunks.tile_tokens * group_block, chunks.num_tiles * num_kv_heads
    config = config or choose_config(rows, num_programs, q_THD.dtype, q_THD.device)
    least = max(_LEAST_PART_TOKENS, config.tile_keys)
    num_parts = max(1, min(config.num_parts, triton.cdiv(page_table_SM.shape[1] * page_tokens, least)))
    is_joined = num_parts > 1
    out = q_THD.new_empty(q_THD.shape)
    parts, lse = out, out
    if is_joined:
        parts = q_THD.new_empty((num_tokens, num_heads, num_parts, head_dim), dtype=torch.float32)
        lse = q_THD.new_empty((num_tokens, num_heads, num_parts), dtype=torch.float32)
    gate = q_THD if gate_THD is None else gate_THD
    lists = (chunks.cu_seqlens_N1, chunks.context_lengths_N, chunks.tile_chunks_B, chunks.tile_starts_B)
    cut = {
        "TOKENS": chunks.tile_tokens,
        "HEAD_DIM": head_dim,
        "KEYS": config.tile_keys,
        "LEAST": least,
        "HAS_GATE": gate_THD is not None,
    }
    _prefill_kernel[(num_kv_heads, chunks.num_tiles, num_parts)](
        q_THD,
        k_cache_PShD,
        v_cache_PShD,
        page_table_SM,
        lists[0] if table_rows_N is None else table_rows_N,
        *lists,
        gate,
        out,
        parts,
        lse,
        scale * LOG2_E,
        *q_THD.stride()[:2],
        *gate.stride()[:2],
        page_table_SM.stride(0),
        num_tokens,
        chunks.num_chunks,
        num_parts,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=group_block,
        PAGE_TOKENS=page_tokens,
        IS_JOINED_LATER=is_joined,
        HAS_TABLE_ROWS=table_rows_N is not None,
        FORMAT=product_format(q_THD.dtype, k_cache_PShD.dtype),
        PRECISION="ieee" if q_THD.dtype is torch.float32 else "tf32",
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **cut,
    )
    if is_joined:
        _join_tiles_kernel[(num_heads, chunks.num_tiles * chunks.tile_tokens)](
            parts,
            lse,
            *lists,
            gate,
            out,
            *gate.stride()[:2],
            num_parts,
            HEADS=num_heads,
            PARTS_BLOCK=triton.next_power_of_2(num_parts),
            num_warps=4 if num_parts * head_dim > 2048 else 2,
            **cut,
        )
    return out
