"""Decode attention over KV pages in Triton: one new token per row, its context split in parts.

Papers: Kwon et al. 2023, PagedAttention (arXiv 2309.06180); Dao et al. 2023, Flash-Decoding.

Takes head widths 64, 128 and 256, up to 16 query heads per kv head, pages of a power of two of
tokens (at most 64), queries in bf16, fp16 or float32 and a cache in the same format or in fp8
(e4m3, compute capability 8.9 and newer, unit scale). float32 is exact and slow.

One program reads one part of one row's context for all query heads of one kv head; rows of one sequence
that follow each other share it, up to 16 of them and 64 lines of a tile. The grid
depends on the number of rows alone; lengths and lines of the page table are read on the device and
programs beyond a row's parts return at once, so that one CUDA graph serves every context. The parts
are joined by a second launch, which is left out where there is only one. Padding rows have length 0,
read nothing and get zeros. What lies behind a context is never read. With an fp8 cache products are
taken in fp16, which holds every e4m3 number; values are loaded as pairs of columns (`unpack_fp8`).

Measured against float64: on an H200 2.3e-3 relative in bf16 and 1.7e-3 with an fp8 cache (of the
stored numbers); under the interpreter, 1 to 700 tokens, 2e-7 in float32. Shared memory of a program:
75 KB in bf16, 42 KB with an fp8 cache, 34 KB in float32.

Legend: `R` rows, `S` lines of the page table, `M` pages of the longest line, `H` query heads, `h` kv heads, `D` head width,
`B` parts of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dispatch import device_limits, is_interpreted
from kiln_nn.kernels.paged_attention.triton_decode_kernels import decode_kernel, join_kernel
from kiln_nn.kernels.quantised import GROUP_INPUTS, RoundedRows, unwritten_groups

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_MOST_GROUPED_HEADS = 16
_MOST_PAGE_TOKENS = 64
_MOST_PARTS = 64
_LEAST_MMA_ROWS = 16
_MOST_TILE_ROWS = 64
# Enough of them that one long row ends with the others (128 rows of 4 kv heads).
_PROGRAMS_OF_A_FULL_GPU = 512
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
    # Two or more programs fit on a multiprocessor. More parts than that keep a long row among short
    # ones from running alone, but a part that is empty still costs its program's start.
    wanted = triton.cdiv(2 * device_limits(device).num_multiprocessors, programs_per_part)
    is_full = programs_per_part >= _PROGRAMS_OF_A_FULL_GPU
    num_parts = max(4 if is_full else 8, min(_MOST_PARTS, triton.next_power_of_2(wanted)))
    least_part_tokens = max(64, min(512 if is_full else 256, 8 * triton.next_power_of_2(programs_per_part)))
    if q_dtype is torch.float32:  # no tensor cores: the tiles live in registers
        return DecodeConfig(16, least_part_tokens, num_parts, num_warps=4, num_stages=1)
    # Two tiles of keys and values at width 256 are 64 KB: that fits everywhere, thrice on Hopper.
    return DecodeConfig(32, least_part_tokens, num_parts, num_warps=4, num_stages=5)


def invariant_config(q_dtype: torch.dtype) -> DecodeConfig:
    """The one cut for every number of rows: a row's parts then depend on its context alone."""
    if q_dtype is torch.float32:
        return DecodeConfig(16, 256, 16, num_warps=4, num_stages=1)
    return DecodeConfig(32, 256, 16, num_warps=4, num_stages=5)


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
    num_skipped: int = 0,
    rows_per_sequence: int = 1,
    rounds: bool = False,
    config: DecodeConfig | None = None,
) -> torch.Tensor | RoundedRows:
    """As the reference, for inputs that `takes` accepts; rows of length 0 give zeros.

    The skipped tokens are fewer than a tile's. Who joins parts also `rounds`.
    """
    num_rows, num_heads, head_dim = q_RHD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    group = num_heads // num_kv_heads
    run = rows_per_sequence if rows_per_sequence * group <= _MOST_TILE_ROWS else 1
    num_runs = num_rows // run
    config = config or choose_config(num_runs, num_kv_heads, q_RHD.dtype, q_RHD.device)
    most_tokens = page_table_SM.shape[1] * page_tokens
    num_parts = max(1, min(config.num_parts, triton.cdiv(most_tokens, config.least_part_tokens)))
    is_joined = num_parts > 1
    out = q_RHD.new_empty(q_RHD.shape)
    parts = (
        q_RHD.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32) if is_joined else out
    )
    lse = q_RHD.new_empty((num_rows, num_heads, num_parts), dtype=torch.float32) if is_joined else out
    gate = q_RHD if gate_RHD is None else gate_RHD
    is_fp8 = v_cache_PShD.dtype is torch.float8_e4m3fn and not is_interpreted()
    table_rows = context_lengths_R if table_rows_R is None else table_rows_R
    cut = {
        "TILE": config.tile_tokens,
        "LEAST": config.least_part_tokens,
        "HAS_TABLE_ROWS": table_rows_R is not None,
        "HAS_GATE": gate_RHD is not None,
        "SKIPPED": num_skipped,
        "RUN": run,
    }
    decode_kernel[(num_kv_heads, num_runs, num_parts)](
        q_RHD,
        k_cache_PShD,
        v_cache_PShD.view(torch.int16) if is_fp8 else v_cache_PShD,
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
        GROUP_BLOCK=max(_LEAST_MMA_ROWS, triton.next_power_of_2(run * group)),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        IS_JOINED_LATER=is_joined,
        FORMAT=product_format(q_RHD.dtype, k_cache_PShD.dtype),
        PRECISION="ieee" if q_RHD.dtype is torch.float32 else "tf32",
        STAGES=config.num_stages,
        IS_FP8=is_fp8,
        num_warps=config.num_warps,
        **cut,
    )
    rounded = None
    if is_joined:
        if rounds and head_dim % GROUP_INPUTS == 0:
            rounded = unwritten_groups(out.flatten(1))
        join_kernel[(num_heads, num_rows)](
            parts,
            lse,
            table_rows,
            context_lengths_R,
            gate,
            out,
            out if rounded is None else rounded.numbers_TI,
            out if rounded is None else rounded.scales_GT,
            *gate.stride()[:2],
            num_parts,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            PARTS_BLOCK=triton.next_power_of_2(num_parts),
            GROUP_INPUTS=0 if rounded is None else GROUP_INPUTS,
            num_warps=4 if num_parts * head_dim > 2048 else 2,
            **cut,
        )
    return out if rounded is None else rounded


_TRITON_FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_format(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> tl.dtype:
    """What queries, keys and values are converted to before they are multiplied."""
    if is_interpreted():
        return tl.float32
    return tl.float16 if cache_dtype is torch.float8_e4m3fn else _TRITON_FORMATS[q_dtype]
