"""Attention over a paged KV cache: one token per row (decode) and prompt chunks with a past."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.paged_attention import reference
from kiln_nn.kernels.paged_attention.chunks import (
    AttentionChunks,
    choose_tile_tokens,
    chunk_tiles,
    most_tiles,
)
from kiln_nn.kernels.paged_attention.reference import write_kv

__all__ = [
    "AttentionChunks",
    "choose_tile_tokens",
    "chunk_tiles",
    "most_tiles",
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
) -> torch.Tensor:
    """Attend from one new token per row to its sequence, the token itself included."""
    inputs = (q_RHD, k_cache_PShD, v_cache_PShD, page_table_SM, context_lengths_R)
    implementation = reference.paged_decode_attention
    if takes_triton(*inputs, *(() if gate_RHD is None else (gate_RHD,))):
        from kiln_nn.kernels.paged_attention import triton_decode

        if triton_decode.takes(q_RHD, k_cache_PShD, v_cache_PShD, gate_RHD):
            implementation = triton_decode.paged_decode_attention
    return implementation(*inputs, scale, gate_RHD=gate_RHD, table_rows_R=table_rows_R)


def paged_prefill_attention(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_SM: torch.Tensor,
    chunks: AttentionChunks,
    scale: float,
    *,
    gate_THD: torch.Tensor | None = None,
    table_rows_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from chunks of several sequences to their pasts and causally to themselves."""
    inputs = (q_THD, k_cache_PShD, v_cache_PShD, page_table_SM)
    implementation = reference.paged_prefill_attention
    if takes_triton(*inputs):
        from kiln_nn.kernels.paged_attention import triton_prefill

        if triton_prefill.takes(q_THD, k_cache_PShD, v_cache_PShD, chunks, gate_THD):
            implementation = triton_prefill.paged_prefill_attention
    return implementation(*inputs, chunks, scale, gate_THD=gate_THD, table_rows_N=table_rows_N)
