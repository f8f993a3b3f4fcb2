"""The gated delta rule over packed documents, in chunks of up to 64 tokens.

Inside a chunk the recurrence is a unit lower triangular system. With `G` the cumulative
log-decay since the chunk's start (the token's own decay included) and `S` the state there:

    (I + A) u = beta (v - e^G S^T k),  A_ij = beta_i e^(G_i - G_j) (k_i . k_j) for j < i
    o_i = e^(G_i) S^T q_i + sum_(j <= i) e^(G_i - G_j) (q_i . k_j) u_j
    S' = e^(G_C) S + sum_j e^(G_C - G_j) k_j u_j^T

Everything but the passage of S runs for all chunks at once. Only differences `G_i - G_j`
with j <= i are exponentiated, so nothing overflows however fast a head forgets. The
triangular inverse comes from substitution: the doubling product loses all digits when
keys repeat.

Legend: `T` tokens, `N` documents, `H` value heads, `h` key heads, `K`/`V` key and value
width, `M` chunks of `C` tokens, `B` requested boundaries.

Papers: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule
(arXiv 2406.06484); Gated Delta Networks (arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from kiln_nn.kernels.checks import ShapeMismatch, accumulation_dtype, check_cu_seqlens, check_shape


@dataclass(frozen=True)
class DeltaRun:
    """What a run over packed documents gives back, all float32 (float64 for float64 inputs).

    `boundary_states_BHKV` follows the order of the request, document by document.
    `corrected_THV` are the values `u` that were written: with `k` and the cumulative
    log-decay they are the ring entries of the tokens since a page boundary.
    """

    out_THV: torch.Tensor
    final_states_NHKV: torch.Tensor
    boundary_states_BHKV: torch.Tensor
    corrected_THV: torch.Tensor


@dataclass(frozen=True)
class _Layout:
    """Where the tokens go: chunks ordered by step (0th chunk of every document, then the 1st, …).

    Within a step the longest documents come first, so the documents still running are
    always a prefix and each step is one contiguous slice.
    """

    chunk: int
    step_sizes: tuple[int, ...]
    doc_rank: tuple[int, ...]  # document -> its place within a step
    token_of_slot: torch.Tensor  # [M * C]; padding points one past the last token
    slot_of_token: torch.Tensor  # [T]
    rank_of_doc: torch.Tensor  # doc_rank as an index tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may reuse what serving cached
def _layout(bounds: tuple[int, ...], chunk: int, device: torch.device) -> _Layout:
    lengths = [end - start for start, end in pairwise(bounds)]
    chunk = max(1, min(chunk, max(lengths)))
    order = sorted(range(len(lengths)), key=lambda doc: -lengths[doc])
    step_sizes: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for offset in range(0, max(lengths), chunk):
        running = [doc for doc in order if lengths[doc] > offset]
        step_sizes.append(len(running))
        starts.extend(bounds[doc] + offset for doc in running)
        ends.extend(bounds[doc + 1] for doc in running)
    tokens = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(chunk)
    is_token = tokens < torch.tensor(ends, dtype=torch.long)[:, None]
    slot_of_token = torch.empty(bounds[-1], dtype=torch.long)
    slot_of_token[tokens[is_token]] = is_token.flatten().nonzero()[:, 0]
    doc_rank = [0] * len(lengths)
    for rank, doc in enumerate(order):
        doc_rank[doc] = rank
    return _Layout(
        chunk=chunk,
        step_sizes=tuple(step_sizes),
        doc_rank=tuple(doc_rank),
        token_of_slot=tokens.masked_fill(~is_token, bounds[-1]).flatten().to(device),
        slot_of_token=slot_of_token.to(device),
        rank_of_doc=torch.tensor(doc_rank, dtype=torch.long, device=device),
    )


class _UnitLowerInverse(torch.autograd.Function):
    """Inverse of I + A for strictly lower triangular A; the backward keeps only the inverse."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grads[0] @ inverse.mT).tril(-1)


@dataclass(frozen=True)
class _Chunks:
    """Everything about the chunks that does not depend on the states between them."""

    k: torch.Tensor  # [M, H, C, K]
    log_decay: torch.Tensor  # [M, H, C], cumulative from the chunk's start
    corrected0: torch.Tensor  # [M, H, C, V]: u if S were zero
    from_state: torch.Tensor  # [M, H, C, K]: u = corrected0 - from_state S
    decayed_q: torch.Tensor  # [M, H, C, K]
    decayed_k: torch.Tensor  # [M, H, C, K], decayed to the chunk's end
    scores: torch.Tensor  # [M, H, C, C], decayed q.k, lower triangular


def _prepare(
    layout: _Layout,
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_THV: torch.Tensor,
    g_TH: torch.Tensor,
    beta_TH: torch.Tensor,
) -> _Chunks:
    def to_chunks(x: torch.Tensor) -> torch.Tensor:
        """[T, heads, ...] to [M, heads, C, ...], padding with zeros, which change nothing."""
        padded = torch.cat((x, x.new_zeros(1, *x.shape[1:]))).index_select(0, layout.token_of_slot)
        return padded.view(-1, layout.chunk, *x.shape[1:]).transpose(1, 2).contiguous()

    group = v_THV.shape[1] // k_ThK.shape[1]
    q, k, v, g, beta = (to_chunks(x) for x in (q_ThK, k_ThK, v_THV, g_TH, beta_TH))
    kk, qk = (k @ k.mT).repeat_interleave(group, dim=1), (q @ k.mT).repeat_interleave(group, dim=1)
    q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)

    log_decay = g.cumsum(-1)
    not_later = torch.ones(layout.chunk, layout.chunk, dtype=torch.bool, device=g.device).tril()
    differences = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~not_later, -torch.inf)
    decay = differences.exp()
    inverse = _UnitLowerInverse.apply((beta[..., None] * kk * decay).tril(-1))
    since_start = log_decay.exp()[..., None]
    to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]
    return _Chunks(
        k=k,
        log_decay=log_decay,
        corrected0=inverse @ (beta[..., None] * v),
        from_state=inverse @ (beta[..., None] * since_start * k),
        decayed_q=since_start * q,
        decayed_k=to_end * k,
        scores=qk * decay,
    )


def _boundary_slots(
    layout: _Layout, bounds: tuple[int, ...], boundaries: Sequence[Sequence[int]]
) -> list[tuple[int, int, int]]:
    """For each requested offset: its chunk, its rank within the step, its tokens within the chunk."""
    if len(boundaries) != len(bounds) - 1:
        raise ShapeMismatch("boundaries", (len(boundaries),), (len(bounds) - 1,))
    first_chunk = [0]
    for size in layout.step_sizes:
        first_chunk.append(first_chunk[-1] + size)
    slots = []
    for doc, offsets in enumerate(boundaries):
        length = bounds[doc + 1] - bounds[doc]
        for offset in offsets:
            if not 0 < offset <= length:
                raise ShapeMismatch("boundary", (offset,), (f"1 to {length}",))
            step = (offset - 1) // layout.chunk
            rank = layout.doc_rank[doc]
            slots.append((first_chunk[step] + rank, rank, offset - step * layout.chunk))
    return slots


def _states_at(
    chunks: _Chunks,
    slots: Sequence[tuple[int, int, int]],
    start_states: dict[int, torch.Tensor],
    corrected_MHCV: torch.Tensor,
) -> torch.Tensor:
    """States after the given number of tokens of the given chunks, `[B, H, K, V]`."""
    device = corrected_MHCV.device
    chunk_ids = torch.tensor([chunk_id for chunk_id, _, _ in slots], device=device)
    num_tokens = torch.tensor([count for _, _, count in slots], device=device)
    starts = torch.stack([start_states[chunk_id] for chunk_id, _, _ in slots])
    log_decay = chunks.log_decay[chunk_ids]
    last = (num_tokens - 1)[:, None, None].expand(-1, log_decay.shape[1], 1)
    total = log_decay.gather(-1, last)
    is_later = torch.arange(log_decay.shape[-1], device=device) >= num_tokens[:, None, None]
    weights = (total - log_decay).masked_fill(is_later, -torch.inf).exp()
    written = (chunks.k[chunk_ids] * weights[..., None]).mT @ corrected_MHCV[chunk_ids]
    return total.exp()[..., None] * starts + written


def gated_delta_chunked(
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_THV: torch.Tensor,
    g_TH: torch.Tensor,
    beta_TH: torch.Tensor,
    cu_seqlens: Sequence[int],
    initial_states_NHKV: torch.Tensor | None = None,
    *,
    boundaries: Sequence[Sequence[int]] | None = None,
    chunk: int = 64,
) -> DeltaRun:
    """Run the gated delta rule over packed documents; differentiable by autograd.

    Args:
        cu_seqlens: N + 1 document boundaries from 0 to T; the state starts anew at each.
        initial_states_NHKV: the state before each document's first token here (zeros if None).
        boundaries: per document the numbers of tokens after which the state is wanted too.
        chunk: most tokens in one chunk.

    Raises:
        ShapeMismatch: shapes, document boundaries or requested boundaries do not fit.
    """
    num_tokens, num_heads, value_dim = v_THV.shape
    num_key_heads, key_dim = k_ThK.shape[1:]
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    num_docs = len(bounds) - 1
    check_shape("k", k_ThK, (num_tokens, num_key_heads, key_dim))
    check_shape("q", q_ThK, (num_tokens, num_key_heads, key_dim))
    check_shape("g", g_TH, (num_tokens, num_heads))
    check_shape("beta", beta_TH, (num_tokens, num_heads))
    dtype = accumulation_dtype(v_THV, g_TH)
    if initial_states_NHKV is None:
        initial_states_NHKV = torch.zeros(
            num_docs, num_heads, key_dim, value_dim, dtype=dtype, device=v_THV.device
        )
    check_shape("initial_states", initial_states_NHKV, (num_docs, num_heads, key_dim, value_dim))
    layout = _layout(bounds, chunk, v_THV.device)
    slots = _boundary_slots(layout, bounds, boundaries) if boundaries is not None else []
    states = initial_states_NHKV.to(dtype)
    if num_tokens == 0:
        return DeltaRun(v_THV.to(dtype), states, states[:0], v_THV.to(dtype))

    chunks = _prepare(layout, *(x.to(dtype) for x in (q_ThK, k_ThK, v_THV, g_TH, beta_TH)))
    by_rank = states.index_select(0, torch.argsort(layout.rank_of_doc))
    wanted = {chunk_id: rank for chunk_id, rank, _ in slots}
    passed = _pass_states(layout, chunks, by_rank, wanted)
    out = passed.from_state_MHCV + chunks.scores @ passed.corrected_MHCV

    def to_tokens(x_MHCV: torch.Tensor) -> torch.Tensor:
        return x_MHCV.transpose(1, 2).flatten(0, 1).index_select(0, layout.slot_of_token)

    return DeltaRun(
        out_THV=to_tokens(out),
        final_states_NHKV=passed.final_by_rank.index_select(0, layout.rank_of_doc),
        boundary_states_BHKV=(
            _states_at(chunks, slots, passed.start_states, passed.corrected_MHCV) if slots else states[:0]
        ),
        corrected_THV=to_tokens(passed.corrected_MHCV),
    )


@dataclass(frozen=True)
class _Passed:
    corrected_MHCV: torch.Tensor
    from_state_MHCV: torch.Tensor
    final_by_rank: torch.Tensor
    start_states: dict[int, torch.Tensor]  # chunk id -> [H, K, V], the wanted ones


def _pass_states(layout: _Layout, chunks: _Chunks, state: torch.Tensor, wanted: dict[int, int]) -> _Passed:
    """Carry the states from chunk to chunk; all running documents move together."""
    sizes = list(layout.step_sizes)
    chunk_decay = chunks.log_decay[..., -1].exp()[..., None, None]
    steps = zip(
        *(x.split(sizes) for x in (chunks.corrected0, chunks.from_state, chunks.decayed_q)),
        *(x.split(sizes) for x in (chunks.decayed_k, chunk_decay)),
        strict=True,
    )
    corrected_steps, output_steps, finished = [], [], []
    start_states: dict[int, torch.Tensor] = {}
    first_chunk = 0
    for size, (corrected0, from_state, decayed_q, decayed_k, decay) in zip(sizes, steps, strict=True):
        if size < state.shape[0]:
            finished.append(state[size:])
            state = state[:size]
        for chunk_id in range(first_chunk, first_chunk + size):
            if chunk_id in wanted:
                start_states[chunk_id] = state[wanted[chunk_id]]
        corrected = corrected0 - from_state @ state
        output_steps.append(decayed_q @ state)
        corrected_steps.append(corrected)
        state = decay * state + decayed_k.mT @ corrected
        first_chunk += size
    finished.append(state)
    return _Passed(
        torch.cat(corrected_steps), torch.cat(output_steps), torch.cat(finished[::-1]), start_states
    )
