"""Attention of prompt chunks over KV pages in Triton: tiles of query tokens, causal, with a past.

Papers: Dao 2023, FlashAttention-2 (arXiv 2307.08691); Kwon et al. 2023, PagedAttention (arXiv
2309.06180); Dao et al. 2023, Flash-Decoding.

Takes head widths 64, 128 and 256, up to 16 query heads per kv head, pages of a power of two of
tokens (at most 64), queries in bf16 or fp16 and a cache in the same format or in fp8 (e4m3,
compute capability 8.9 and newer, unit scale); float32 for tiles of up to 16 rows. With an fp8
cache products are taken in fp16, which holds every e4m3 number and converts in one instruction.

One program does one tile of tokens for all query heads of one kv head, so that keys and values
are read once for them: 32 tokens x 4 heads are the 128 rows of a Hopper tile. There, what every row
sees runs without a mask. Few tiles are not enough programs: then each tile's context is cut in parts,
which a second launch joins. The grid depends on the number of tiles alone. What lies behind a
context is never read; tokens of no chunk get zeros.

Measured against float64: on an H200 2.4e-3 relative in bf16 up to 32,768 tokens, 1.7e-3 with an fp8
cache (of the stored numbers); under the interpreter 4e-7 in float32. Shared memory of a program at
width 256 in bf16: 192 KB with 128 rows and 64 keys, 84 KB with 128 rows and 16 keys, 98 KB with 64
rows, 75 KB with 16.

Legend: `T` tokens, `S` table rows, `M` pages of the longest sequence, `H` query heads, `h` kv
heads, `D` head width, `N` chunks, `B` query tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kiln_nn.kernels.dispatch import device_limits, is_interpreted
from kiln_nn.kernels.paged_attention.chunks import TILE_ROWS, AttentionChunks
from kiln_nn.kernels.paged_attention.triton_decode import LOG2_E, product_format, takes_cache
from kiln_nn.kernels.paged_attention.triton_prefill_kernels import join_tiles_kernel, prefill_kernel

_MOST_FLOAT32_ROWS = 16
_MOST_PARTS = 16
_LEAST_PARTS_OF_DRAFTS = 4
_LEAST_PART_TOKENS = 256


@dataclass(frozen=True)
class PrefillConfig:
    """How a launch is cut: keys per tile, parts of a context, and how much is loaded ahead.

    Page numbers are loaded before what they point to, so every tile loaded ahead costs two stages.
    """

    tile_keys: int
    num_parts: int
    num_warps: int
    num_stages: int


def takes(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    gate_THD: torch.Tensor | None,
    chunks: AttentionChunks,
) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    rows = chunks.tile_tokens * triton.next_power_of_2(q_THD.shape[1] // k_cache_PShD.shape[2])
    is_exact = q_THD.dtype is torch.float32 and not is_interpreted()
    most_rows = _MOST_FLOAT32_ROWS if is_exact else TILE_ROWS[-1]
    return (
        takes_cache(q_THD, k_cache_PShD, v_cache_PShD)
        and chunks.num_tiles > 0
        and TILE_ROWS[0] <= rows <= most_rows
        and (gate_THD is None or gate_THD.stride(2) == 1)
    )


def choose_config(rows: int, num_programs: int, q_dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """Cut a launch of tiles of `rows` rows so that the GPU is full; depends on shapes only."""
    limits = device_limits(device)
    is_large = rows >= TILE_ROWS[-1]
    # One large program fits on a multiprocessor, or two others; tiles that are padding need no room.
    room = (1 if is_large else 3) * limits.num_multiprocessors // num_programs
    num_parts = min(_MOST_PARTS, 1 << max(0, room.bit_length() - 1))
    if rows <= TILE_ROWS[0]:  # a decode pass with drafts: bound by memory, as in triton_decode
        num_parts = max(_LEAST_PARTS_OF_DRAFTS, num_parts)
    if q_dtype is torch.float32:  # no tensor cores: the tiles live in registers
        return PrefillConfig(16, num_parts, num_warps=4, num_stages=1)
    if is_large:
        # Beside the queries, 64 KB for 128 rows of 256, one tile of keys and one of values.
        memory_kib = limits.shared_memory_bytes // 1024
        tile_keys = 64 if memory_kib >= 200 else 32 if memory_kib >= 128 else 16
        return PrefillConfig(tile_keys, num_parts, num_warps=8, num_stages=2 if tile_keys == 64 else 3)
    return PrefillConfig(32, num_parts, num_warps=4, num_stages=5 if rows <= TILE_ROWS[0] else 3)


def invariant_config(q_dtype: torch.dtype) -> PrefillConfig:
    """The one cut for tiles of up to 64 rows, however many there are."""
    if q_dtype is torch.float32:
        return PrefillConfig(16, 4, num_warps=4, num_stages=1)
    return PrefillConfig(32, 4, num_warps=4, num_stages=3)


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
    # Larger tiles are multiplied from shared memory, where values go as fp16 anyway.
    is_paired = k_cache_PShD.dtype is torch.float8_e4m3fn and rows <= TILE_ROWS[0] and not is_interpreted()
    lists = (chunks.cu_seqlens_N1, chunks.context_lengths_N, chunks.tile_chunks_B, chunks.tile_starts_B)
    cut = {
        "TOKENS": chunks.tile_tokens,
        "HEAD_DIM": head_dim,
        "KEYS": config.tile_keys,
        "LEAST": least,
        "HAS_GATE": gate_THD is not None,
    }
    prefill_kernel[(num_kv_heads, chunks.num_tiles, num_parts)](
        q_THD,
        k_cache_PShD,
        v_cache_PShD.view(torch.int16) if is_paired else v_cache_PShD,
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
        PAIRED=is_paired,
        # A loop of its own for keys without a mask saves arithmetic, but fills its pipeline anew.
        HAS_FREE_LOOP=rows >= TILE_ROWS[-1],
        num_warps=config.num_warps,
        **cut,
    )
    if is_joined:
        join_tiles_kernel[(num_heads, chunks.num_tiles * chunks.tile_tokens)](
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
