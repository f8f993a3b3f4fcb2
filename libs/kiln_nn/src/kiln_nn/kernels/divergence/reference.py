"""Full-vocabulary divergences in chunks, recomputed in the backward pass, in plain torch.

Student and teacher are the same base model under different adapters, so one frozen head turns
both hidden states into logits, and neither `[T, vocabulary]` matrix ever exists as a whole. With
p the student's distribution, q the teacher's, and m = beta q + (1 - beta) p:

    reverse_kl  KL(p || q)                              d / d p_j = log p_j - log q_j + 1
    forward_kl  KL(q || p)                              d / d p_j = -q_j / p_j
    jsd         beta KL(q || m) + (1 - beta) KL(p || m) d / d p_j = (1 - beta) (log p_j - log m_j)

and a derivative r with respect to p becomes `p (r - sum(p r))` with respect to the logits.

Papers: Agarwal et al. 2023, On-policy distillation of language models, GKD (arXiv 2306.13649),
whose beta this is; Gu et al. 2023, MiniLLM (arXiv 2306.08543), reverse KL.

Legend: `T` tokens, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import accumulation_dtype, check_shape

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]

CHUNK_LOGITS = 2**24  # most logits at once, in each of a handful of float32 temporaries


class TokenDivergences(NamedTuple):
    """Per token, in nats; float32 (float64 for float64 hidden states).

    Only `divergences_T` has a gradient. `reverse_kls_T` is KL(student || teacher), whichever
    divergence was asked for; `entropies_T` and `logprobs_T` (of the targets) are the student's.
    `overlaps_T` is what the distributions have in common, the sum of the lesser probabilities: how often
    a draw from one can stand for one from the other (Leviathan et al. 2022, arXiv 2211.17192).
    """

    divergences_T: torch.Tensor
    reverse_kls_T: torch.Tensor
    entropies_T: torch.Tensor
    logprobs_T: torch.Tensor
    overlaps_T: torch.Tensor


def token_divergences(
    student_TD: torch.Tensor,
    teacher_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    kind: DivergenceKind,
    *,
    beta: float = 0.5,
    chunk_tokens: int | None = None,
) -> TokenDivergences:
    """How far the student's next-token distribution is from the teacher's after each position.

    `targets_T[t]` is the token that follows position t; it affects `logprobs_T` alone. `beta`, the
    teacher's share of the mixture, is for "jsd". Gradients flow into `student_TD` only.
    """
    num_tokens, width = student_TD.shape
    check_shape("teacher", teacher_TD, (num_tokens, width))
    check_shape("head", head_weight_VD, (None, width))
    check_shape("targets", targets_T, (num_tokens,))
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // head_weight_VD.shape[0])
    return TokenDivergences(
        *_TokenDivergences.apply(
            student_TD, teacher_TD.detach(), head_weight_VD, targets_T, kind, beta, chunk_tokens
        )
    )


def log_softmax(hidden: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[T, V]` of hidden states `[T, D]`, in at least float32."""
    hidden = hidden.to(head.dtype)
    if head.is_cuda and head.dtype in (torch.bfloat16, torch.float16):
        # The product is accumulated in float32 anyway: take it before it is rounded.
        return torch.log_softmax(torch.mm(hidden, head.t(), out_dtype=torch.float32), dim=-1)
    return torch.log_softmax(F.linear(hidden, head).to(dtype), dim=-1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: DivergenceKind, beta: float) -> torch.Tensor:
    """Of student p and teacher q, over the last dimension."""
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a || b) over the last dimension."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """log(beta q + (1 - beta) p)."""
    share = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device)
    return torch.logaddexp(log_q + share.log(), log_p + (1 - share).log())


def _logit_grads(log_p: torch.Tensor, log_q: torch.Tensor, kind: DivergenceKind, beta: float) -> torch.Tensor:
    p = log_p.exp()
    if kind == "forward_kl":
        return p - log_q.exp()
    log_other = log_q if kind == "reverse_kl" else log_mixture(log_p, log_q, beta)
    share = 1.0 if kind == "reverse_kl" else 1 - beta
    by_p = share * (log_p - log_other)
    return p * (by_p - (p * by_p).sum(-1, keepdim=True))


class _TokenDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        kind: DivergenceKind,
        beta: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, ...]:
        dtype = accumulation_dtype(student)
        results = [student.new_empty(student.shape[0], dtype=dtype) for _ in TokenDivergences._fields]
        divergences, reverse_kls, entropies, logprobs, overlaps = results
        for start in range(0, student.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            log_p = log_softmax(student[part], head, dtype)
            log_q = log_softmax(teacher[part], head, dtype)
            divergences[part] = divergence(log_p, log_q, kind, beta)
            reverse_kls[part] = kl(log_p, log_q)
            entropies[part] = -(log_p.exp() * log_p).sum(-1)
            logprobs[part] = log_p.gather(-1, targets[part, None])[:, 0]
            overlaps[part] = torch.minimum(log_p, log_q).exp().sum(-1)
        ctx.save_for_backward(student, teacher, head)
        ctx.kind, ctx.beta, ctx.chunk_tokens = kind, beta, chunk_tokens
        ctx.mark_non_differentiable(reverse_kls, entropies, logprobs, overlaps)
        return divergences, reverse_kls, entropies, logprobs, overlaps

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, head = ctx.saved_tensors
        divergence_grads = grads[0]
        student_grad = torch.empty_like(student)
        dtype = accumulation_dtype(student)
        for start in range(0, student.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            log_p = log_softmax(student[part], head, dtype)
            log_q = log_softmax(teacher[part], head, dtype)
            logit_grads = _logit_grads(log_p, log_q, ctx.kind, ctx.beta) * divergence_grads[part, None]
            student_grad[part] = (logit_grads.to(head.dtype) @ head).to(student.dtype)
        return (student_grad, *[None] * 6)
