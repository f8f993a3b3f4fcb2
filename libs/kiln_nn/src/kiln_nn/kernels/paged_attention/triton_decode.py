"""Decode attention over KV pages in Triton: one new token per row, its context split in parts.

Papers: Kwon et al. 2023, PagedAttention (arXiv 2309.06180); Dao et al. 2023, Flash-Decoding.

Takes head widths 64, 128 and 256, up to 16 query heads per kv head, pages of a power of two of
tokens (at most 64), queries in bf16, fp16 or float32 and a cache in the same format or in fp8
(e4m3, compute capability 8.9 and newer, unit scale). float32 is exact and slow.

One program reads one part of one row's context for all query heads of one kv head. The grid
depends on the number of rows alone; lengths are read on the device and programs beyond a row's
parts return at once, so that one CUDA graph serves every context. The parts are joined by a
second launch, which is left out where there is only one. Padding rows have length 0, read
nothing and get zeros. What lies behind a context is never read.

Measured against float64 under the interpreter, 1 to 700 tokens: 2e-7 relative in float32, 3e-3
in bf16 (there the interpreter cuts where a GPU rounds). Shared memory of a program: 75 KB in bf16,
42 KB with an fp8 cache, 34 KB in float32.

Legend: `R` rows, `M` pages of the longest row, `H` query heads, `h` kv heads, `D` head width,
`B` parts of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dispatch import device_limits, is_interpreted

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_MOST_GROUPED_HEADS = 16
_MOST_PAGE_TOKENS = 64
_LEAST_PARTS = 4
_MOST_PARTS = 64
_LEAST_MMA_ROWS = 16
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeConfig:
    """How a launch is cut: tokens per tile and per part, and how much is loaded ahead.

    Page numbers are loaded before what they point to, so every tile loaded ahead costs two
    stages: `num_stages=5` keeps two tiles of keys and values in shared memory.
    """

    tile_tokens: int
    least_part_tokens: int
    num_parts: int
    num_warps: int
    num_stages: int


@triton.jit
def _part_of_context(context, part, num_parts, LEAST: tl.constexpr, TILE: tl.constexpr):
    """First and last token (exclusive) of one part; whole tiles, except at the context's end."""
    length = tl.maximum(tl.cdiv(tl.cdiv(context, num_parts), TILE) * TILE, LEAST)
    first = part * length
    return first, tl.minimum(first + length, context)


@triton.jit
def _context_and_line(context_ptr, table_row_ptr, row, HAS_TABLE_ROWS: tl.constexpr):
    """Tokens of a row and its line of the page table; a row without a line has no token."""
    context = tl.load(context_ptr + row).to(tl.int32)
    table_row = row
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_row_ptr + row).to(tl.int64)
        context = tl.where(table_row < 0, 0, context)
    return context, table_row


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    page_row_ptr,
    kv_head,
    first,
    last,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax over tokens `first` to `last` of one sequence: weighted values, their total weight
    and the highest score, which the weights are relative to. Scores are in units of log 2.
    """
    columns = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, TILE)
    highest = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    mixed = tl.zeros((q.shape[0], HEAD_DIM), tl.float32)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        tokens = start + in_tile
        is_token = tokens < last
        pages = tl.load(page_row_ptr + tokens // PAGE_TOKENS, mask=is_token, other=0).to(tl.int64)
        slots = (pages * PAGE_TOKENS + tokens % PAGE_TOKENS) * KV_HEADS + kv_head
        places = slots[:, None] * HEAD_DIM + columns[None, :]
        k = tl.load(k_ptr + places, mask=is_token[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - rising[:, None])
        faded = tl.exp2(highest - rising)
        v = tl.load(v_ptr + places, mask=is_token[:, None], other=0.0).to(q.dtype)
        total = total * faded + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(q.dtype), v, mixed * faded[:, None], input_precision=PRECISION)
        highest = rising
    return mixed, total, highest


@triton.jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    table_row_ptr,
    context_ptr,
    gate_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    scale,
    q_row_stride,
    q_head_stride,
    gate_row_stride,
    gate_head_stride,
    table_stride,
    num_parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    IS_JOINED_LATER: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    FORMAT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    context, table_row = _context_and_line(context_ptr, table_row_ptr, row, HAS_TABLE_ROWS)
    first, last = _part_of_context(context, part, num_parts, LEAST, TILE)
    if IS_JOINED_LATER and first >= context:
        return
    grouped = tl.arange(0, GROUP_BLOCK)
    is_head = grouped < GROUP
    heads = kv_head * GROUP + grouped
    columns = tl.arange(0, HEAD_DIM)
    q_places = row * q_row_stride + heads[:, None] * q_head_stride + columns[None, :]
    q = tl.load(q_ptr + q_places, mask=is_head[:, None], other=0.0).to(FORMAT)
    mixed, total, highest = _attend(
        q,
        k_ptr,
        v_ptr,
        page_table_ptr + table_row * table_stride,
        kv_head,
        first,
        last,
        scale,
        KV_HEADS,
        HEAD_DIM,
        PAGE_TOKENS,
        TILE,
        PRECISION,
        STAGES,
    )
    # A padding row has no token: its total is zero and so is its output.
    out = mixed / tl.maximum(total, 1e-30)[:, None]
    if IS_JOINED_LATER:
        entry = (row * (KV_HEADS * GROUP) + heads) * num_parts + part
        tl.store(part_out_ptr + entry[:, None] * HEAD_DIM + columns[None, :], out, mask=is_head[:, None])
        tl.store(part_lse_ptr + entry, highest + tl.log2(total), mask=is_head)
    else:
        if HAS_GATE:
            gate_places = row * gate_row_stride + heads[:, None] * gate_head_stride + columns[None, :]
            gate = tl.load(gate_ptr + gate_places, mask=is_head[:, None], other=0.0)
            out *= tl.sigmoid(gate.to(tl.float32))
        out_places = (row * (KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(out_ptr + out_places, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None])


@triton.jit
def _join_kernel(
    part_out_ptr,
    part_lse_ptr,
    table_row_ptr,
    context_ptr,
    gate_ptr,
    out_ptr,
    gate_row_stride,
    gate_head_stride,
    num_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """Weigh the parts of one row and head by their share of the softmax, and gate the sum."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    context, _ = _context_and_line(context_ptr, table_row_ptr, row, HAS_TABLE_ROWS)
    parts = tl.arange(0, PARTS_BLOCK)
    first, _ = _part_of_context(context, parts, num_parts, LEAST, TILE)
    is_part = (parts < num_parts) & (first < context)
    columns = tl.arange(0, HEAD_DIM)
    entries = (row * HEADS + head) * num_parts + parts
    lse = tl.load(part_lse_ptr + entries, mask=is_part, other=float("-inf"))
    share = tl.where(is_part, tl.exp2(lse - tl.max(tl.where(is_part, lse, -1e30), 0)), 0.0)
    share = share / tl.maximum(tl.sum(share, 0), 1e-30)
    part_out = tl.load(
        part_out_ptr + entries[:, None] * HEAD_DIM + columns[None, :], mask=is_part[:, None], other=0.0
    )
    out = tl.sum(part_out * share[:, None], 0)
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gate_row_stride + head * gate_head_stride + columns)
        out *= tl.sigmoid(gate.to(tl.float32))
    tl.store(out_ptr + (row * HEADS + head) * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty))


def takes_cache(q_RHD: torch.Tensor, k_cache_PShD: torch.Tensor, v_cache_PShD: torch.Tensor) -> bool:
    """Whether the attention kernels compute with these queries and this cache."""
    num_rows, num_heads, head_dim = q_RHD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    cache_format = k_cache_PShD.dtype
    is_fp8 = cache_format is torch.float8_e4m3fn and q_RHD.dtype is not torch.float32
    if is_fp8 and q_RHD.is_cuda:
        is_fp8 = torch.cuda.get_device_capability(q_RHD.device) >= (8, 9)
    return (
        num_rows > 0
        and q_RHD.dtype in _FORMATS
        and (cache_format is q_RHD.dtype or is_fp8)
        and v_cache_PShD.dtype is cache_format
        and head_dim in _HEAD_DIMS
        and num_heads // num_kv_heads <= _MOST_GROUPED_HEADS
        and page_tokens <= _MOST_PAGE_TOKENS
        and page_tokens & (page_tokens - 1) == 0
        and k_cache_PShD.is_contiguous()
        and v_cache_PShD.is_contiguous()
        and q_RHD.stride(2) == 1
    )


def takes(
    q_RHD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    gate_RHD: torch.Tensor | None,
) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    return takes_cache(q_RHD, k_cache_PShD, v_cache_PShD) and (gate_RHD is None or gate_RHD.stride(2) == 1)


def choose_config(
    num_rows: int, num_kv_heads: int, q_dtype: torch.dtype, device: torch.device
) -> DecodeConfig:
    """Cut a launch so that the GPU is full at any length and long rows do not run alone.

    Depends on shapes only: a CUDA graph captured with it stays right for every context.
    """
    programs_per_part = num_rows * num_kv_heads
    # Two or more programs fit on a multiprocessor; at least four parts keep one long row among
    # short ones from running alone. A part that is empty still costs its program's start.
    wanted = triton.cdiv(2 * device_limits(device).num_multiprocessors, programs_per_part)
    num_parts = max(_LEAST_PARTS, min(_MOST_PARTS, triton.next_power_of_2(wanted)))
    least_part_tokens = max(64, min(256, 8 * triton.next_power_of_2(programs_per_part)))
    if q_dtype is torch.float32:  # no tensor cores: the tiles live in registers
        return DecodeConfig(16, least_part_tokens, num_parts, num_warps=4, num_stages=1)
    # Two tiles of keys and values at width 256 are 64 KB: that fits everywhere, thrice on Hopper.
    return DecodeConfig(32, least_part_tokens, num_parts, num_warps=4, num_stages=5)


def paged_decode_attention(
    q_RHD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_SM: torch.Tensor,
    context_lengths_R: torch.Tensor,
    scale: float,
    *,
    gate_RHD: torch.Tensor | None = None,
    table_rows_R: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts; rows of length 0 give zeros."""
    num_rows, num_heads, head_dim = q_RHD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    config = config or choose_config(num_rows, num_kv_heads, q_RHD.dtype, q_RHD.device)
    most_tokens = page_table_SM.shape[1] * page_tokens
    num_parts = max(1, min(config.num_parts, triton.cdiv(most_tokens, config.least_part_tokens)))
    is_joined = num_parts > 1
    out = q_RHD.new_empty(q_RHD.shape)
    parts = (
        q_RHD.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32) if is_joined else out
    )
    lse = q_RHD.new_empty((num_rows, num_heads, num_parts), dtype=torch.float32) if is_joined else out
    gate = q_RHD if gate_RHD is None else gate_RHD
    table_rows = context_lengths_R if table_rows_R is None else table_rows_R
    cut = {
        "TILE": config.tile_tokens,
        "LEAST": config.least_part_tokens,
        "HAS_TABLE_ROWS": table_rows_R is not None,
        "HAS_GATE": gate_RHD is not None,
    }
    group = num_heads // num_kv_heads
    _decode_kernel[(num_kv_heads, num_rows, num_parts)](
        q_RHD,
        k_cache_PShD,
        v_cache_PShD,
        page_table_SM,
        table_rows,
        context_lengths_R,
        gate,
        out,
        parts,
        lse,
        scale * LOG2_E,
        *q_RHD.stride()[:2],
        *gate.stride()[:2],
        page_table_SM.stride(0),
        num_parts,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(_LEAST_MMA_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        IS_JOINED_LATER=is_joined,
        FORMAT=product_format(q_RHD.dtype, k_cache_PShD.dtype),
        PRECISION="ieee" if q_RHD.dtype is torch.float32 else "tf32",
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **cut,
    )
    if is_joined:
        _join_kernel[(num_heads, num_rows)](
            parts,
            lse,
            table_rows,
            context_lengths_R,
            gate,
            out,
            *gate.stride()[:2],
            num_parts,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            PARTS_BLOCK=triton.next_power_of_2(num_parts),
            num_warps=4 if num_parts * head_dim > 2048 else 2,
            **cut,
        )
    return out


_TRITON_FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_format(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> tl.dtype:
    """What queries, keys and values are converted to before they are multiplied."""
    if is_interpreted():
        return tl.float32
    return tl.float16 if cache_dtype is torch.float8_e4m3fn else _TRITON_FORMATS[q_dtype]
