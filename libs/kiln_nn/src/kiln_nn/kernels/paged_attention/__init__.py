"""Attention over a paged KV cache: one token per row (decode) and chunks of tokens with a past."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kiln_nn.kernels.checks import ShapeMismatch, check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.paged_attention import reference
from kiln_nn.kernels.paged_attention.chunks import (
    NO_CHUNK,
    AttentionChunks,
    choose_tile_tokens,
    chunk_tiles,
    most_tiles,
)
from kiln_nn.kernels.paged_attention.reference import paged_prefill_attention, write_kv
from kiln_nn.kernels.quantised import RoundedRows

_MOST_ROWS_OF_A_RUN = 16

__all__ = [
    "NO_CHUNK",
    "AttentionChunks",
    "choose_tile_tokens",
    "chunk_tiles",
    "most_tiles",
    "paged_chunk_attention",
    "paged_decode_attention",
    "paged_prefill_attention",
    "write_kv",
]


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
    is_batch_invariant: bool = False,
    rounds: bool = False,
) -> torch.Tensor | RoundedRows:
    """Attend from one new token per row to its sequence, the token itself included.

    Its key and value are in the cache already and counted in `context_lengths_R`. Row `r` finds
    its pages in line `table_rows[r]` of the table, or in line `r` where no `table_rows` are given.
    Page ids behind a row's context may be any valid page. A row of length 0 or line -1 is padding:
    its output is zero. With a gate, the output is multiplied by its sigmoid.
    Nobody attends to the first `num_skipped` (fewer than 16) tokens of a sequence; a row with no others
    is padding too.

    Rows may come in runs of `rows_per_sequence` (up to 16) that have one sequence and the line of the
    first of them, each with a length of its own: the kernel then reads keys and values once for a run. The
    reference ignores that.

    On a GPU nothing depends on a length the host would have to know, so the call can be
    captured in a CUDA graph and replayed for any lengths that fit the page table. A batch-invariant
    kernel cuts a context by its length alone, whatever the number of rows; the reference ignores that.

    Returns: `[R, H, D]` in the format of `q_RHD`. With `rounds` the same as rows `[R, H D]` that are rounded to
    E4M3 too, a scale for each 128 outputs, where contexts are cut in parts and heads are as wide or twice as
    wide; only on GPUs that have the format.
    """
    num_rows, num_heads, head_dim = q_RHD.shape
    check_shape("k_cache", k_cache_PShD, (None, None, None, head_dim))
    check_shape("v_cache", v_cache_PShD, tuple(k_cache_PShD.shape))
    check_shape("page_table", page_table_SM, (num_rows if table_rows_R is None else None, None))
    check_shape("context_lengths", context_lengths_R, (num_rows,))
    optional = [x for x in (gate_RHD, table_rows_R) if x is not None]
    if gate_RHD is not None:
        check_shape("gate", gate_RHD, (num_rows, num_heads, head_dim))
    if table_rows_R is not None:
        check_shape("table_rows", table_rows_R, (num_rows,))
    if not 1 <= rows_per_sequence <= _MOST_ROWS_OF_A_RUN or num_rows % rows_per_sequence:
        raise ShapeMismatch("q", q_RHD.shape, (f"a multiple of {rows_per_sequence}", num_heads, head_dim))
    inputs = (q_RHD, k_cache_PShD, v_cache_PShD, page_table_SM, context_lengths_R)
    implementation: Callable[..., torch.Tensor | RoundedRows] = reference.paged_decode_attention
    if takes_triton(*inputs, *optional):
        from kiln_nn.kernels.paged_attention import triton_decode

        if triton_decode.takes(q_RHD, k_cache_PShD, v_cache_PShD, gate_RHD):
            implementation = partial(
                triton_decode.paged_decode_attention,
                rows_per_sequence=rows_per_sequence,
                rounds=rounds,
                config=triton_decode.invariant_config(q_RHD.dtype) if is_batch_invariant else None,
            )
    options = {"gate_RHD": gate_RHD, "table_rows_R": table_rows_R, "num_skipped": num_skipped}
    return implementation(*inputs, scale, **options)


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
    is_batch_invariant: bool = False,
) -> torch.Tensor:
    """Attend from chunks of several sequences to their pasts and causally to themselves.

    The chunks' keys and values are all in the cache already. Chunk `n` finds its pages in line
    `table_rows[n]` of the table, or in line `n` where no `table_rows` are given. With a gate, the
    output is multiplied by its sigmoid. `scale` is positive.

    On a GPU nothing depends on what the lists hold, so the call can be captured in a CUDA graph
    and replayed with other chunks that fit the lists. The reference reads them on the host. What a
    batch-invariant kernel makes of a chunk depends on its tiles' size and on no other chunk; the
    reference ignores that.

    Returns: `[T, H, D]` in the format of `q_THD`; tokens behind the last chunk are zero.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    chunks.check()
    check_shape("k_cache", k_cache_PShD, (None, None, None, head_dim))
    check_shape("v_cache", v_cache_PShD, tuple(k_cache_PShD.shape))
    check_shape("page_table", page_table_SM, (chunks.num_chunks if table_rows_N is None else None, None))
    optional = [x for x in (gate_THD, table_rows_N) if x is not None]
    if gate_THD is not None:
        check_shape("gate", gate_THD, (num_tokens, num_heads, head_dim))
    if table_rows_N is not None:
        check_shape("table_rows", table_rows_N, (chunks.num_chunks,))
    inputs = (q_THD, k_cache_PShD, v_cache_PShD, page_table_SM)
    implementation: Callable[..., torch.Tensor] = reference.paged_chunk_attention
    if takes_triton(*inputs, chunks.cu_seqlens_N1, *optional):
        from kiln_nn.kernels.paged_attention import triton_prefill

        if triton_prefill.takes(q_THD, k_cache_PShD, v_cache_PShD, gate_THD, chunks):
            implementation = partial(
                triton_prefill.paged_chunk_attention,
                config=triton_prefill.invariant_config(q_THD.dtype) if is_batch_invariant else None,
            )
    return implementation(*inputs, chunks, scale, gate_THD=gate_THD, table_rows_N=table_rows_N)
