"""Softmax attention over KV pages, in plain torch.

A cache is `[P, S, h, D]`: pages, tokens in a page, kv heads, head width. Token `i` of a
sequence lies in page `page_table[i // S]` at place `i % S`.

Legend: `R` rows, `T` tokens, `S` lines of the page table, `M` most pages of any line, `H` query
heads, `h` kv heads, `N` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import ShapeMismatch, check_cu_seqlens, check_shape
from kiln_nn.kernels.paged_attention.chunks import AttentionChunks

# Most scores of a prompt chunk at once: 256 MiB of float32 where they are really stored.
MOST_SCORES = 2**26
# Most tokens whose keys and values decode copies out of the pages at once (padding included):
# without a bound, one long row would pad all of its neighbours to its length.
MOST_GATHERED_TOKENS = 65_536


def write_kv(cache_PShD: torch.Tensor, token_slots_T: torch.Tensor, x_ThD: torch.Tensor) -> None:
    """Store one row per token in place; a token's slot is `page_id * S + place in the page`.

    What an fp8 cache cannot hold becomes the largest number it can.
    """
    flat = cache_PShD.view(-1, *cache_PShD.shape[2:])
    check_shape("x", x_ThD, (token_slots_T.shape[0], *flat.shape[1:]))
    if cache_PShD.dtype.itemsize > 1:
        flat.index_copy_(0, token_slots_T, x_ThD.to(cache_PShD.dtype))
        return
    most = torch.finfo(cache_PShD.dtype).max
    stored = x_ThD.clamp(-most, most).to(cache_PShD.dtype)
    flat.view(torch.uint8).index_copy_(0, token_slots_T, stored.view(torch.uint8))


def _pages(cache_PShD: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Copies of some pages; torch selects single bytes only as integers."""
    if cache_PShD.dtype.itemsize > 1:
        return cache_PShD.index_select(0, page_ids)
    return cache_PShD.view(torch.uint8).index_select(0, page_ids).view(cache_PShD.dtype)


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
) -> torch.Tensor:
    """Attend from one new token per row to its sequence, the token itself included.

    Its key and value are in the cache already and counted in `context_lengths_R`. What the page
    table holds behind a row's context does not matter. Row `r` reads line `table_rows[r]` of the
    page table, or line `r`. A row of length 0 or line -1 is padding: its output is zero. With a
    gate, the output is multiplied by its sigmoid.

    Returns: `[R, H, D]` in the format of `q_RHD`.
    """
    num_rows, _, head_dim = q_RHD.shape
    check_shape("k_cache", k_cache_PShD, (None, None, None, head_dim))
    check_shape("v_cache", v_cache_PShD, tuple(k_cache_PShD.shape))
    lines_R = torch.arange(num_rows, device=q_RHD.device)
    if table_rows_R is not None:
        lines_R = table_rows_R.clamp_min(0)
        context_lengths_R = context_lengths_R.masked_fill(table_rows_R < 0, 0)
    context_lengths_R = context_lengths_R.masked_fill(context_lengths_R <= num_skipped, 0)
    out = torch.zeros_like(q_RHD, memory_format=torch.contiguous_format)
    for rows, num_tokens in row_groups(context_lengths_R.tolist()):
        index = torch.tensor(rows, device=q_RHD.device)
        num_pages = -(-num_tokens // k_cache_PShD.shape[1])
        pages_RM = page_table_SM[:, :num_pages].index_select(0, lines_R.index_select(0, index))
        contexts = context_lengths_R.index_select(0, index)
        q = q_RHD.index_select(0, index)
        attended = _attend_rows(q, k_cache_PShD, v_cache_PShD, pages_RM, contexts, scale, num_skipped)
        out.index_copy_(0, index, attended)
    return out if gate_RHD is None else out * torch.sigmoid(gate_RHD)


def row_groups(context_lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows whose contexts, padded to the longest, stay within `MOST_GATHERED_TOKENS`, or one longer row.

    Returns: rows and longest context of each group; rows of length 0 are in none.
    """
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
    num_skipped: int,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q_RHD.shape
    page_tokens, num_kv_heads = k_cache_PShD.shape[1:3]
    num_places = pages_RM.shape[1] * page_tokens
    places = torch.arange(num_places, device=q_RHD.device)
    # A row's first page stands in behind its context: another might hold NaN, which no mask stops.
    is_own = places[::page_tokens] < context_lengths_R[:, None]
    pages = torch.where(is_own, pages_RM, pages_RM[:, :1]).flatten()
    k, v = (
        _pages(cache, pages).view(num_rows, num_places, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (k_cache_PShD, v_cache_PShD)
    )
    in_context = ((places >= num_skipped) & (places < context_lengths_R[:, None]))[:, None, None]
    # The query heads of one kv head stand where attention usually has query tokens.
    q = q_RHD.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=in_context, scale=scale)
    return out.reshape(num_rows, num_heads, head_dim)


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
) -> torch.Tensor:
    """Attend from chunks of several sequences to their pasts and causally to themselves.

    Reads the lengths on the host; the division into tiles does not matter here.

    Returns: `[T, H, D]` in the format of `q_THD`; tokens of no chunk are zero.
    """
    bounds, contexts = chunks.cu_seqlens_N1.tolist(), chunks.context_lengths_N.tolist()
    lines = list(range(chunks.num_chunks)) if table_rows_N is None else table_rows_N.tolist()
    used = [n for n in range(chunks.num_chunks) if bounds[n + 1] > bounds[n]]
    if not used:
        return torch.zeros_like(q_THD)
    page_tokens, num_tokens = k_cache_PShD.shape[1], bounds[-1]
    attended = paged_prefill_attention(
        q_THD[:num_tokens],
        k_cache_PShD,
        v_cache_PShD,
        [page_table_SM[lines[n], : -(-contexts[n] // page_tokens)] for n in used],
        [bounds[n] for n in used] + [num_tokens],
        [contexts[n] for n in used],
        scale,
    )
    if gate_THD is not None:
        attended = attended * torch.sigmoid(gate_THD[:num_tokens])
    return F.pad(attended, (0, 0, 0, 0, 0, q_THD.shape[0] - num_tokens))


def paged_prefill_attention(
    q_THD: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
    page_tables: Sequence[torch.Tensor],
    cu_seqlens: Sequence[int],
    context_lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """As `paged_chunk_attention`, with the lengths and every sequence's page numbers on the host.

    Sequence n brings tokens `cu_seqlens[n]:cu_seqlens[n + 1]`, the last of its
    `context_lengths[n]` tokens, whose keys and values are all in the cache already.

    Returns: `[T, H, D]` in the format of `q_THD`.
    """
    bounds = check_cu_seqlens(cu_seqlens, q_THD.shape[0])
    if not len(page_tables) == len(context_lengths) == len(bounds) - 1:
        raise ShapeMismatch("page_tables", (len(page_tables), len(context_lengths)), (len(bounds) - 1,) * 2)
    outputs = []
    for n, context_length in enumerate(context_lengths):
        q_nHD = q_THD[bounds[n] : bounds[n + 1]]
        num_new = q_nHD.shape[0]
        if num_new == 0:
            continue
        if not num_new <= context_length <= page_tables[n].shape[0] * k_cache_PShD.shape[1]:
            raise ShapeMismatch("context", (context_length,), (f"{num_new} or more, within its pages",))
        k_hCD, v_hCD = (
            _pages(cache, page_tables[n]).flatten(0, 1)[:context_length].transpose(0, 1).to(q_nHD.dtype)
            for cache in (k_cache_PShD, v_cache_PShD)
        )
        block = max(1, MOST_SCORES // (q_nHD.shape[1] * context_length))
        for first in range(0, num_new, block):
            q = q_nHD[first : first + block]
            end = context_length - num_new + first + q.shape[0]
            outputs.append(_attend_to_past(q, k_hCD[:, :end], v_hCD[:, :end], scale))
    return torch.cat(outputs) if outputs else torch.zeros_like(q_THD)


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
