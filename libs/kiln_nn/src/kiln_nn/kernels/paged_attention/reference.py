"""Softmax attention over KV pages, in plain torch.

A cache is `[P, S, h, D]`: pages, tokens in a page, kv heads, head width. Token `i` of a
sequence lies in page `page_table[i // S]` at place `i % S`.

Legend: `R` rows, `T` tokens, `M` most pages of any row, `H` query heads, `h` kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.paged_attention.chunks import AttentionChunks

# Most scores of a prompt chunk at once: 256 MiB of float32 where they are really stored.
MOST_SCORES = 2**26
# Most tokens whose keys and values decode copies out of the pages at once (padding included):
# without a bound, one long row would pad all of its neighbours to its length.
MOST_GATHERED_TOKENS = 65_536


def write_kv(cache_PShD: torch.Tensor, token_slots_T: torch.Tensor, x_ThD: torch.Tensor) -> None:
    """Store one row per token in place; a token's slot is `page_id * S + place in the page`."""
    flat = cache_PShD.view(-1, *cache_PShD.shape[2:])
    check_shape("x", x_ThD, (token_slots_T.shape[0], *flat.shape[1:]))
    flat.index_copy_(0, token_slots_T, x_ThD.to(cache_PShD.dtype))


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
    """See the package's public function. Waits for the device."""
    out = torch.zeros_like(q_RHD, memory_format=torch.contiguous_format)
    for rows, num_tokens in _row_groups(context_lengths_R.tolist()):
        index = torch.tensor(rows, device=q_RHD.device)
        num_pages = -(-num_tokens // k_cache_PShD.shape[1])
        lines = index if table_rows_R is None else table_rows_R.index_select(0, index)
        pages_RM = page_table_SM[:, :num_pages].index_select(0, lines)
        contexts = context_lengths_R.index_select(0, index)
        q = q_RHD.index_select(0, index)
        out.index_copy_(0, index, _attend_rows(q, k_cache_PShD, v_cache_PShD, pages_RM, contexts, scale))
    return out if gate_RHD is None else out * torch.sigmoid(gate_RHD)


def _row_groups(context_lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows whose contexts, padded to the longest, stay within `MOST_GATHERED_TOKENS`, or one longer row."""
    used = [row for row, length in enumerate(context_lengths) if length]
    by_length = sorted(used, key=lambda row: -context_lengths[row])
    groups = []
    first = 0
    while first < len(by_length):
        longest = context_lengths[by_length[first]]
        num_rows = max(1, MOST_GATHERED_TOKENS // longest)
        groups.append((sorted(by_length[first : first + num_rows]), longest))
        first += num_rows
    return groups


def _attend_rows(
    q_RHD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    pages_RM: torch.Tensor,
    context_lengths_R: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q_RHD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    num_places = pages_RM.shape[1] * page_tokens
    places = torch.arange(num_places, device=q_RHD.device)
    # A row's first page stands in behind its context: another might hold NaN, which no mask stops.
    is_own = places[::page_tokens] < context_lengths_R[:, None]
    pages = torch.where(is_own, pages_RM, pages_RM[:, :1]).flatten()
    k, v = (
        cache.index_select(0, pages).view(num_rows, num_places, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (k_cache_PShD, v_cache_PShD)
    )
    in_context = (places < context_lengths_R[:, None])[:, None, None]
    # The query heads of one kv head stand where attention usually has query tokens.
    q = q_RHD.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=in_context, scale=scale)
    return out.reshape(num_rows, num_heads, head_dim)


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
    """See the package's public function. Waits for the device."""
    bounds, contexts = chunks.cu_seqlens_N1.tolist(), chunks.context_lengths_N.tolist()
    lines = range(chunks.num_chunks) if table_rows_N is None else table_rows_N.tolist()
    out = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    for n, line in enumerate(lines):
        first, last, context_length = bounds[n], bounds[n + 1], contexts[n]
        if first == last:
            continue
        pages = page_table_SM[line, : -(-context_length // k_cache_PShD.shape[1])]
        k_hCD, v_hCD = (
            cache.index_select(0, pages).flatten(0, 1)[:context_length].transpose(0, 1).to(q_THD.dtype)
            for cache in (k_cache_PShD, v_cache_PShD)
        )
        block = max(1, MOST_SCORES // (q_THD.shape[1] * context_length))
        for start in range(first, last, block):
            q = q_THD[start : min(start + block, last)]
            end = context_length - last + start + q.shape[0]
            out[start : start + q.shape[0]] = _attend_to_past(q, k_hCD[:, :end], v_hCD[:, :end], scale)
    return out if gate_THD is None else out * torch.sigmoid(gate_THD)


def _attend_to_past(
    q_nHD: torch.Tensor, k_hCD: torch.Tensor, v_hCD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend from the last n of C tokens, each to itself and what is before it."""
    num_new, num_heads, head_dim = q_nHD.shape
    num_kv_heads, context_length = k_hCD.shape[:2]
    group = num_heads // num_kv_heads
    # The query heads of one kv head stand side by side, so that keys need not be repeated for them.
    q = q_nHD.reshape(num_new, num_kv_heads, group, head_dim).transpose(0, 1).flatten(1, 2)
    places = torch.arange(context_length, device=q.device)
    visible = (places <= places[context_length - num_new :, None]).repeat_interleave(group, dim=0)
    out = F.scaled_dot_product_attention(q[None], k_hCD[None], v_hCD[None], attn_mask=visible, scale=scale)[0]
    return out.view(num_kv_heads, num_new, group, head_dim).transpose(0, 1).flatten(1, 2)
