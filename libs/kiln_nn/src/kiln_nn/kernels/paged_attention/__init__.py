"""Attention over a paged KV cache: one token per row (decode) and prompt chunks with a past."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.paged_attention import reference
from kiln_nn.kernels.paged_attention.reference import paged_prefill_attention, write_kv

__all__ = ["paged_decode_attention", "paged_prefill_attention", "write_kv"]


def paged_decode_attention(
    q_RHD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_RM: torch.Tensor,
    context_lengths_R: torch.Tensor,
    scale: float,
    *,
    gate_RHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one new token per row to its sequence, the token itself included.

    Its key and value are in the cache already and counted in `context_lengths_R`. Page
    ids behind a row's context may be any valid page. A row of length 0 is padding: its
    output is zero. With a gate, the output is multiplied by its sigmoid.

    On a GPU nothing depends on a length the host would have to know, so the call can be
    captured in a CUDA graph and replayed for any lengths that fit the page table.

    Returns: `[R, H, D]` in the format of `q_RHD`.
    """
    num_rows, num_heads, head_dim = q_RHD.shape
    check_shape("k_cache", k_cache_PShD, (None, None, None, head_dim))
    check_shape("v_cache", v_cache_PShD, tuple(k_cache_PShD.shape))
    check_shape("page_table", page_table_RM, (num_rows, None))
    check_shape("context_lengths", context_lengths_R, (num_rows,))
    if gate_RHD is not None:
        check_shape("gate", gate_RHD, (num_rows, num_heads, head_dim))
    inputs = (q_RHD, k_cache_PShD, v_cache_PShD, page_table_RM, context_lengths_R)
    implementation = reference.paged_decode_attention
    if takes_triton(*inputs, *(() if gate_RHD is None else (gate_RHD,))):
        from kiln_nn.kernels.paged_attention import triton_decode

        if triton_decode.takes(q_RHD, k_cache_PShD, v_cache_PShD, gate_RHD):
            implementation = triton_decode.paged_decode_attention
    return implementation(*inputs, scale, gate_RHD=gate_RHD)
