"""Forward and backward of the gated delta rule over chunks, written out in plain torch.

This is the derivation that `triton_forward` and `triton_backward` follow, one product after the
other, for a document that begins with a state of zeros. Inside a chunk with cumulative log-decays
`G`, decays `D_ij = e^(G_i - G_j)` for j <= i, and the state `S` before it:

    A_ij = beta_i D_ij (k_i . k_j) for j < i,   (I + A) u = beta (v - e^G S^T k)
    o = e^G S^T q + P u,  P_ij = D_ij (q_i . k_j) for j <= i
    S' = e^(G_C) S + sum_j e^(G_C - G_j) k_j u_j^T

Backward, with `do` and the gradient `dS'` of the state after the chunk:

    du = P^T do + e^(G_C - G) k dS'           gradient of u
    r  = (I + A)^-T du                        gradient of the right-hand side: dv = beta r
    dS = e^(G_C) dS' + (e^G q)^T do - (beta e^G k)^T r
    dA = -r u^T below the diagonal,  dP = do u^T on and below it

Everything else is the product rule. A gradient of `G` is that of all log-decays up to its token.

Legend: `T` tokens, `H` value heads, `h` key heads (each serves H/h consecutive value heads),
`K`/`V` key and value width, `C` tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from kiln_nn.kernels.checks import accumulation_dtype


class DeltaGradients(NamedTuple):
    """In the order of the inputs; those of shared key heads are sums over their value heads."""

    q_ThK: torch.Tensor
    k_ThK: torch.Tensor
    v_THV: torch.Tensor
    g_TH: torch.Tensor
    beta_TH: torch.Tensor


class _Chunk(NamedTuple):
    """One chunk, heads first, and what both directions need of it."""

    q_HCK: torch.Tensor
    k_HCK: torch.Tensor
    v_HCV: torch.Tensor
    beta_HC1: torch.Tensor
    since_start_HC1: torch.Tensor  # e^G
    to_end_HC1: torch.Tensor  # e^(G_C - G)
    total_H11: torch.Tensor  # e^(G_C)
    decay_HCC: torch.Tensor  # D, zeros above the diagonal
    inverse_HCC: torch.Tensor  # (I + A)^-1

    @property
    def scores_HCC(self) -> torch.Tensor:
        return self.q_HCK @ self.k_HCK.mT * self.decay_HCC


def _chunk(inputs: Sequence[torch.Tensor], rows: slice) -> _Chunk:
    q, k, v, g, beta = (x[rows].transpose(0, 1) for x in inputs)
    log_decay_HC = g.cumsum(-1)
    differences = log_decay_HC[:, :, None] - log_decay_HC[:, None, :]
    not_later = torch.ones(differences.shape[1:], dtype=torch.bool, device=g.device).tril()
    decay = differences.masked_fill(~not_later, -torch.inf).exp()
    a = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return _Chunk(
        q_HCK=q,
        k_HCK=k,
        v_HCV=v,
        beta_HC1=beta[..., None],
        since_start_HC1=log_decay_HC.exp()[..., None],
        to_end_HC1=(log_decay_HC[:, -1:] - log_decay_HC).exp()[..., None],
        total_H11=log_decay_HC[:, -1, None, None].exp(),
        decay_HCC=decay,
        inverse_HCC=torch.linalg.solve_triangular(
            identity + a, identity.expand_as(a), upper=False, unitriangular=True
        ),
    )


def _forward(chunk: _Chunk, state_HKV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs and corrected values `[H, C, V]`, and the state after the chunk."""
    predicted = chunk.since_start_HC1 * (chunk.k_HCK @ state_HKV)
    u = chunk.inverse_HCC @ (chunk.beta_HC1 * (chunk.v_HCV - predicted))
    out = chunk.since_start_HC1 * (chunk.q_HCK @ state_HKV) + chunk.scores_HCC @ u
    return out, u, chunk.total_H11 * state_HKV + (chunk.to_end_HC1 * chunk.k_HCK).mT @ u


def _backward(
    chunk: _Chunk,
    state_HKV: torch.Tensor,
    u_HCV: torch.Tensor,
    out_grad_HCV: torch.Tensor,
    next_grad_HKV: torch.Tensor,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Gradients of q, k, v, g, beta, heads first, and of the state before the chunk."""
    q, k, beta, since_start = chunk.q_HCK, chunk.k_HCK, chunk.beta_HC1, chunk.since_start_HC1
    u_grad = chunk.scores_HCC.mT @ out_grad_HCV + chunk.to_end_HC1 * (k @ next_grad_HKV)
    r = chunk.inverse_HCC.mT @ u_grad
    a_grad = -(r @ u_HCV.mT * chunk.decay_HCC).tril(-1)  # of beta_i (k_i . k_j)
    p_grad = out_grad_HCV @ u_HCV.mT * chunk.decay_HCC  # of q_i . k_j
    q_from_state = since_start * (out_grad_HCV @ state_HKV.mT)
    k_from_state = -since_start * (r @ state_HKV.mT)
    k_from_next = chunk.to_end_HC1 * (u_HCV @ next_grad_HKV.mT)

    q_grad = q_from_state + p_grad @ k
    weighted = beta * a_grad
    k_grad = beta * k_from_state + k_from_next + (weighted + weighted.mT) @ k + p_grad.mT @ q
    of_a = a_grad * (k @ k.mT)
    beta_grad = (r * chunk.v_HCV).sum(-1) + (k_from_state * k).sum(-1) + of_a.sum(-1)

    of_next = (k_from_next * k).sum(-1)
    decayed = beta * of_a + p_grad * (q @ k.mT)
    log_decay_grad = (q_from_state * q).sum(-1) + (beta * k_from_state * k).sum(-1) - of_next
    log_decay_grad = log_decay_grad + decayed.sum(-1) - decayed.sum(-2)
    log_decay_grad[:, -1] += of_next.sum(-1) + (chunk.total_H11 * state_HKV * next_grad_HKV).sum((1, 2))
    g_grad = log_decay_grad.flip(-1).cumsum(-1).flip(-1)

    state_grad = chunk.total_H11 * next_grad_HKV + (since_start * q).mT @ out_grad_HCV
    state_grad = state_grad - (beta * since_start * k).mT @ r
    return (q_grad, k_grad, beta * r, g_grad, beta_grad), state_grad


def _spread(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs in the accumulation format, key heads repeated for their value heads."""
    group = inputs[2].shape[1] // inputs[1].shape[1]
    dtype = accumulation_dtype(*inputs)
    q, k, v, g, beta = (x.to(dtype) for x in inputs)
    return [q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v, g, beta]


def _chunks_of(start: int, end: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, end)) for first in range(start, end, chunk))


def delta_forward(
    inputs: Sequence[torch.Tensor], cu_seqlens: Sequence[int], chunk: int = 64
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Outputs `[T, H, V]`, the state before every chunk, and the corrected values `[T, H, V]`.

    `inputs` are q, k, v, g and beta as `delta_train` takes them.
    """
    spread = _spread(inputs)
    out, corrected, states = torch.zeros_like(spread[2]), torch.zeros_like(spread[2]), []
    for start, end in pairwise(cu_seqlens):
        state = spread[2].new_zeros(spread[2].shape[1], spread[1].shape[2], spread[2].shape[2])
        for rows in _chunks_of(start, end, chunk):
            states.append(state)
            out_HCV, u_HCV, state = _forward(_chunk(spread, rows), state)
            out[rows], corrected[rows] = out_HCV.transpose(0, 1), u_HCV.transpose(0, 1)
    return out, states, corrected


def delta_backward(
    inputs: Sequence[torch.Tensor], cu_seqlens: Sequence[int], out_grad_THV: torch.Tensor, chunk: int = 64
) -> DeltaGradients:
    """Gradients of the inputs for the gradient of the outputs."""
    spread = _spread(inputs)
    _, states, corrected = delta_forward(inputs, cu_seqlens, chunk)
    grads = [torch.zeros_like(x) for x in spread]
    for start, end in reversed(list(pairwise(cu_seqlens))):
        state_grad = torch.zeros_like(states[0]) if states else spread[2]
        for rows in reversed(list(_chunks_of(start, end, chunk))):
            u = corrected[rows].transpose(0, 1)
            out_grad = out_grad_THV[rows].to(u.dtype).transpose(0, 1)
            of_chunk, state_grad = _backward(_chunk(spread, rows), states.pop(), u, out_grad, state_grad)
            for whole, part in zip(grads, of_chunk, strict=True):
                whole[rows] = part.transpose(0, 1)
    num_key_heads = inputs[1].shape[1]
    for index in (0, 1):
        grads[index] = grads[index].unflatten(1, (num_key_heads, -1)).sum(2)
    return DeltaGradients(*grads)
