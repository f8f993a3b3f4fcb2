"""Attention over a paged KV cache: one token per row (decode) and prompt chunks with a past."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.paged_attention import reference
from kiln_nn.kernels.paged_attention.chunks import TILE_TOKENS, PromptChunks
from kiln_nn.kernels.paged_attention.reference import paged_prefill_attention, write_kv

__all__ = ["TILE_TOKENS", "PromptChunks", "paged_decode_attention", "paged_prefill_attention", "write_kv"]


def paged_decode_attention(
    q_RHD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_table_LM: torch.Tensor,
    context_lengths_R: torch.Tensor,
    scale: float,
    *,
    table_rows_R: torch.Tensor,
    gate_RHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one new token per row to its sequence, the token itself included."""
    return reference.paged_decode_attention(
        q_RHD,
        k_cache_PShD,
        v_cache_PShD,
        page_table_LM,
        context_lengths_R,
        scale,
        table_rows_R=table_rows_R,
        gate_RHD=gate_RHD,
    )
