"""Cuts a job into optimiser steps, and each step into micro-batches of packed documents.

Documents lie one after the other in a micro-batch, without padding; the model starts afresh at
each boundary. The cut depends on lengths, settings and seed alone, so that a resumed job finds
the steps it left.

Legend: `T` tokens of a micro-batch, `S` its scored tokens, `M` those that a draft could
have foreseen, `K` likeliest tokens of a teacher.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from kiln_trainer.data.documents import Document
from kiln_trainer.recipes.errors import DocumentTooLong
from kiln_trainer.recipes.options import RunOptions


@dataclass(frozen=True)
class StepPlan:
    """One optimiser step: for every micro-batch, the indices of its documents."""

    micro_batches: tuple[tuple[int, ...], ...]

    @property
    def documents(self) -> tuple[int, ...]:
        """Every document of the step, in order."""
        return tuple(index for micro_batch in self.micro_batches for index in micro_batch)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: packed tokens and the streams of its scored tokens.

    Each document ends with the token before its last scored one: nothing after it has a gradient.
    `rows_S` are the positions in T whose hidden state predicts `targets_S`, `document_S` counts
    the micro-batch's documents from 0. NaN in a log-probability stream means unknown. The teacher's
    likeliest tokens are there where a teacher on another engine has judged the documents. `drafted_M`
    counts through S: the tokens with two tokens before them in their document.
    """

    cu_seqlens: tuple[int, ...]
    token_ids_T: torch.Tensor
    rows_S: torch.Tensor
    targets_S: torch.Tensor
    document_S: torch.Tensor
    temperature_S: torch.Tensor
    ce_weight_S: torch.Tensor
    policy_weight_S: torch.Tensor
    advantage_S: torch.Tensor
    sampler_logprob_S: torch.Tensor
    old_logprob_S: torch.Tensor
    reference_logprob_S: torch.Tensor
    drafted_M: torch.Tensor
    teacher_ids_SK: torch.Tensor | None = None
    teacher_logprobs_SK: torch.Tensor | None = None

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return PackedBatch(cu_seqlens=self.cu_seqlens, **moved)


def first_fit(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put each document into the first micro-batch with room for it, opening a new one if none has.

    Raises:
        DocumentTooLong: a document is longer than `capacity` tokens.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        length = lengths[index]
        if length > capacity:
            raise DocumentTooLong(index, length, capacity)
        slot = next((i for i, free in enumerate(room) if free >= length), len(room))
        if slot == len(room):
            batches.append([])
            room.append(capacity)
        batches[slot].append(index)
        room[slot] -= length
    return [tuple(batch) for batch in batches]


def plan_steps(lengths: Sequence[int], options: RunOptions) -> tuple[StepPlan, ...]:
    """All optimiser steps of a job whose documents have `lengths` tokens.

    Every epoch goes through all documents once, in an order of its own; no step reaches across
    epochs.
    """
    steps = []
    for epoch in range(options.epochs):
        order = list(range(len(lengths)))
        random.Random(f"{options.seed}:{epoch}").shuffle(order)
        batches = first_fit(order, lengths, options.batch_tokens)
        size = options.gradient_accumulation or len(batches)
        steps += [StepPlan(tuple(batches[i : i + size])) for i in range(0, len(batches), size)]
    return tuple(steps)


def pack(
    documents: Sequence[Document],
    old_logprobs: Sequence[torch.Tensor] | None = None,
    reference_logprobs: Sequence[torch.Tensor] | None = None,
) -> PackedBatch:
    """Lay documents one after the other.

    `old_logprobs`, `reference_logprobs`: for each document its stream [s], from the policy as it
    was when the job began and from the base model; None is unknown throughout.
    """
    cu_seqlens = [0]
    tokens, rows, targets, owners = [], [], [], []
    for number, document in enumerate(documents):
        num_inputs = int(document.scored_s[-1])
        tokens.append(document.token_ids_n[:num_inputs])
        rows.append(document.scored_s - 1 + cu_seqlens[-1])
        targets.append(document.token_ids_n[document.scored_s])
        owners.append(torch.full_like(document.scored_s, number))
        cu_seqlens.append(cu_seqlens[-1] + num_inputs)
    unknown = [torch.full_like(document.sampler_logprob_s, torch.nan) for document in documents]
    tops = [document.teacher_top for document in documents if document.teacher_top is not None]
    return PackedBatch(
        cu_seqlens=tuple(cu_seqlens),
        token_ids_T=torch.cat(tokens),
        rows_S=torch.cat(rows),
        targets_S=torch.cat(targets),
        document_S=torch.cat(owners),
        temperature_S=torch.cat([torch.full_like(d.ce_weight_s, d.temperature) for d in documents]),
        ce_weight_S=torch.cat([d.ce_weight_s for d in documents]),
        policy_weight_S=torch.cat([d.policy_weight_s for d in documents]),
        advantage_S=torch.cat([d.advantage_s for d in documents]),
        sampler_logprob_S=torch.cat([d.sampler_logprob_s for d in documents]),
        old_logprob_S=torch.cat(list(old_logprobs or unknown)),
        reference_logprob_S=torch.cat(list(reference_logprobs or unknown)),
        drafted_M=(torch.cat([d.scored_s for d in documents]) >= 2).nonzero()[:, 0],
        teacher_ids_SK=torch.cat([top.ids_sK for top in tops]) if tops else None,
        teacher_logprobs_SK=torch.cat([top.logprobs_sK for top in tops]) if tops else None,
    )
