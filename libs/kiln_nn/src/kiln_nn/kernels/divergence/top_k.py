"""Divergences from a teacher of whom only the likeliest tokens are known, in chunks, in plain torch.

The teacher's k likeliest tokens keep a place each, and all others share one, the tail: both
distributions are summed up over those k + 1 places and compared there. By the data processing
inequality that is never more than the divergence over the whole vocabulary, and with k as large as the
vocabulary it is the same. With P and Q the summed distributions of student and teacher, and r the
derivative of the divergence with respect to P as in reference.py,

    d / d logit_j = p_j (r of j's place - sum(P r))

How the tail's mass is spread among its tokens is the student's affair.

Papers: Agarwal et al. 2023, GKD (arXiv 2306.13649), for the divergences; Anshumann et al. 2025, Sparse
logit sampling (arXiv 2503.16870), for what goes wrong where the k probabilities are taken for all
there is; the tail as one more place is TRL's (`loss_add_tail` of its DistillationConfig).

Legend: `T` tokens, `D` hidden width, `V` vocabulary, `K` likeliest tokens, `P` places (K and the tail).
"""

from __future__ import annotations

from typing import Any

import torch

from kiln_nn.kernels.checks import accumulation_dtype, check_shape
from kiln_nn.kernels.divergence.reference import (
    CHUNK_LOGITS,
    DivergenceKind,
    TokenDivergences,
    divergence,
    kl,
    log_mixture,
    log_softmax,
)

# The sum of a teacher's float32 probabilities is no more exact than this, nor is what it leaves.
_LEAST_TAIL = 1e-6


def top_k_divergences(
    student_TD: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_logprobs_TK: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    kind: DivergenceKind,
    *,
    beta: float = 0.5,
    chunk_tokens: int | None = None,
) -> TokenDivergences:
    """As `token_divergences`, of a teacher given by its K likeliest tokens after each position.

    `teacher_ids_TK` are K different tokens, `teacher_logprobs_TK` their log-probabilities among all V.
    `divergences_T`, `reverse_kls_T` and `overlaps_T` are those over the K + 1 places.
    """
    num_tokens, width = student_TD.shape
    num_top = teacher_ids_TK.shape[-1]
    check_shape("teacher's tokens", teacher_ids_TK, (num_tokens, num_top))
    check_shape("teacher's log-probabilities", teacher_logprobs_TK, (num_tokens, num_top))
    check_shape("head", head_weight_VD, (None, width))
    check_shape("targets", targets_T, (num_tokens,))
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // head_weight_VD.shape[0])
    return TokenDivergences(
        *_TopKDivergences.apply(
            student_TD,
            teacher_ids_TK,
            teacher_logprobs_TK,
            head_weight_VD,
            targets_T,
            kind,
            beta,
            chunk_tokens,
        )
    )


def _teacher_places(logprobs_TK: torch.Tensor, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """log Q `[T, P]`; without a tail where the K are the whole vocabulary."""
    log_q_TK = logprobs_TK.to(dtype)
    if log_q_TK.shape[-1] == vocab_size:
        return log_q_TK
    tail_T1 = (1 - log_q_TK.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_TAIL)
    return torch.cat((log_q_TK, tail_T1.log()), dim=-1)


def _student_places(log_p_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """log P `[T, P]`, the tail's from the tail itself: one less the others would lose what is small."""
    log_p_TK = log_p_TV.gather(-1, ids_TK)
    if ids_TK.shape[-1] == log_p_TV.shape[-1]:
        return log_p_TK
    rest_TV = log_p_TV.scatter(-1, ids_TK, -torch.inf)
    return torch.cat((log_p_TK, rest_TV.logsumexp(-1, keepdim=True)), dim=-1)


def _place_grads(log_P: torch.Tensor, log_Q: torch.Tensor, kind: DivergenceKind, beta: float) -> torch.Tensor:
    """P (r - sum(P r)) of each place, `[T, P]`: what its tokens' logits get together."""
    p = log_P.exp()
    if kind == "forward_kl":
        return p - log_Q.exp()
    log_other = log_Q if kind == "reverse_kl" else log_mixture(log_P, log_Q, beta)
    share = 1.0 if kind == "reverse_kl" else 1 - beta
    by_place = share * (log_P - log_other)
    return p * (by_place - (p * by_place).sum(-1, keepdim=True))


def _logit_grads(
    log_p_TV: torch.Tensor, log_Q: torch.Tensor, ids_TK: torch.Tensor, kind: DivergenceKind, beta: float
) -> torch.Tensor:
    num_top = ids_TK.shape[-1]
    log_P = _student_places(log_p_TV, ids_TK)
    by_place = _place_grads(log_P, log_Q, kind, beta)
    if num_top == log_p_TV.shape[-1]:
        return torch.empty_like(log_p_TV).scatter_(-1, ids_TK, by_place)
    # A token of the tail gets as much of the tail's as it is of it.
    of_tail_TV = (log_p_TV - log_P[:, num_top:]).exp_()
    return of_tail_TV.mul_(by_place[:, num_top:]).scatter_(-1, ids_TK, by_place[:, :num_top])


class _TopKDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        kind: DivergenceKind,
        beta: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, ...]:
        dtype = accumulation_dtype(student)
        results = [student.new_empty(student.shape[0], dtype=dtype) for _ in TokenDivergences._fields]
        divergences, reverse_kls, entropies, own_logprobs, overlaps = results
        for start in range(0, student.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            log_p = log_softmax(student[part], head, dtype)
            log_P = _student_places(log_p, ids[part])
            log_Q = _teacher_places(logprobs[part], head.shape[0], dtype)
            divergences[part] = divergence(log_P, log_Q, kind, beta)
            reverse_kls[part] = kl(log_P, log_Q)
            entropies[part] = -(log_p.exp() * log_p).sum(-1)
            own_logprobs[part] = log_p.gather(-1, targets[part, None])[:, 0]
            overlaps[part] = torch.minimum(log_P, log_Q).exp().sum(-1)
        ctx.save_for_backward(student, ids, logprobs, head)
        ctx.kind, ctx.beta, ctx.chunk_tokens = kind, beta, chunk_tokens
        ctx.mark_non_differentiable(reverse_kls, entropies, own_logprobs, overlaps)
        return divergences, reverse_kls, entropies, own_logprobs, overlaps

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, ids, logprobs, head = ctx.saved_tensors
        student_grad = torch.empty_like(student)
        dtype = accumulation_dtype(student)
        for start in range(0, student.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            log_p = log_softmax(student[part], head, dtype)
            log_Q = _teacher_places(logprobs[part], head.shape[0], dtype)
            logit_grads = _logit_grads(log_p, log_Q, ids[part], ctx.kind, ctx.beta) * grads[0][part, None]
            student_grad[part] = (logit_grads.to(head.dtype) @ head).to(student.dtype)
        return (student_grad, *[None] * 7)
