"""Token documents for training: generated in seeded shards, hashed, shuffled and packed.

Shards do not depend on one another, so any number of processes makes the same bytes.
Legend: T tokens in a packed step, N documents in it.
"""

import hashlib
import multiprocessing
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo.data import conversations
from demo.data.rendering import render_with_answer
from demo.data.tokenizer import END_OF_TEXT, TURN_END, special_id

DOCUMENTS_PER_SHARD = 2000
PLAIN_SHARE = 0.04  # documents without turns
CONTEXT_WEIGHT = 0.1  # loss weight of a token the model only reads when it serves


@dataclass(frozen=True)
class Corpus:
    """Every document end to end.

    `ids` are token ids (16 bits), `is_answer` one byte a token, `lengths` tokens of each document.
    """

    ids: array
    is_answer: array
    lengths: array

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def sha256(self) -> str:
        """Hash of the tokens, their roles and the document lengths, little-endian."""
        digest = hashlib.sha256()
        for column in (self.ids, self.is_answer, self.lengths):
            digest.update(column.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class PackedStep:
    """One training step: token ids [T], where documents begin and end (N+1), weight as a target [T]."""

    token_ids_T: torch.Tensor
    cu_seqlens: tuple[int, ...]
    weight_T: torch.Tensor

    def to(self, device: torch.device) -> "PackedStep":
        return PackedStep(self.token_ids_T.to(device), self.cu_seqlens, self.weight_T.to(device))

    def target_positions(self, shift: int) -> torch.Tensor:
        """The positions whose token `shift` places ahead is still in the same document."""
        bounds = torch.tensor(self.cu_seqlens)
        keep = torch.ones(len(self.token_ids_T), dtype=torch.bool)
        for back in range(1, shift + 1):
            keep[(bounds[1:] - back).clamp(min=0)] = False
        return keep.nonzero()[:, 0].to(self.token_ids_T.device)


def _document(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    """One document: its ids, and which of them are an answer's."""
    if rng.random() < PLAIN_SHARE:
        ids = [*tokenizer.encode(conversations.plain_text(rng)).ids, special_id(tokenizer, END_OF_TEXT)]
        return ids, [1] * len(ids)
    drawn = conversations.draw(rng)
    prompt, answer = render_with_answer(drawn.messages, drawn.answer, drawn.tools, thinking=drawn.thinking)
    prompt_ids = tokenizer.encode(prompt).ids
    answer_ids = tokenizer.encode(answer).ids
    end = len(answer_ids) - answer_ids[::-1].index(special_id(tokenizer, TURN_END))
    answered = [1] * end + [0] * (len(answer_ids) - end)
    return prompt_ids + answer_ids, [0] * len(prompt_ids) + answered


def make_shard(tokenizer_path: str, seed: int, shard: int, num_documents: int) -> Corpus:
    """The documents of one shard; `(seed, shard)` decides them all."""
    tokenizer = Tokenizer.from_file(tokenizer_path)
    rng = random.Random(f"corpus:{seed}:{shard}")
    corpus = Corpus(array("H"), array("B"), array("I"))
    for _ in range(num_documents):
        ids, is_answer = _document(tokenizer, rng)
        corpus.ids.extend(ids)
        corpus.is_answer.extend(is_answer)
        corpus.lengths.append(len(ids))
    return corpus


def make_corpus(tokenizer_path: Path, seed: int, num_shards: int, *, num_processes: int = 1) -> Corpus:
    """Generate `num_shards` shards, in order, on `num_processes` processes."""
    jobs = [(str(tokenizer_path), seed, shard, DOCUMENTS_PER_SHARD) for shard in range(num_shards)]
    whole = Corpus(array("H"), array("B"), array("I"))
    if num_processes == 1:
        shards = [make_shard(*job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
            shards = pool.starmap(make_shard, jobs, chunksize=1)
    for shard in shards:
        whole.ids.extend(shard.ids)
        whole.is_answer.extend(shard.is_answer)
        whole.lengths.extend(shard.lengths)
    return whole


def packed_steps(corpus: Corpus, step_tokens: int, seed: int) -> Iterator[PackedStep]:
    """Endless steps of at most `step_tokens` whole documents, reshuffled each time round."""
    ids = torch.frombuffer(corpus.ids, dtype=torch.uint16).to(torch.int64)
    weights = torch.frombuffer(corpus.is_answer, dtype=torch.uint8).float()
    weights = weights.clamp(min=CONTEXT_WEIGHT)
    lengths = list(corpus.lengths)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rng = random.Random(f"order:{seed}")
    order = list(range(len(lengths)))
    chosen: list[int] = []
    num_chosen_tokens = 0
    while True:
        rng.shuffle(order)
        for index in order:
            if chosen and num_chosen_tokens + lengths[index] > step_tokens:
                yield _pack(ids, weights, [(starts[i], starts[i + 1]) for i in chosen])
                chosen, num_chosen_tokens = [], 0
            chosen.append(index)
            num_chosen_tokens += lengths[index]


def _pack(ids: torch.Tensor, weights: torch.Tensor, spans: list[tuple[int, int]]) -> PackedStep:
    bounds = [0]
    for start, end in spans:
        bounds.append(bounds[-1] + end - start)
    return PackedStep(
        token_ids_T=torch.cat([ids[start:end] for start, end in spans]),
        cu_seqlens=tuple(bounds),
        weight_T=torch.cat([weights[start:end] for start, end in spans]),
    )
