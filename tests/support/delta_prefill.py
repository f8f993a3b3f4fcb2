"""Random prompts for tests of the DeltaNet prefill, and the chunks they come in."""

from __future__ import annotations

import torch

from kiln_nn.kernels.delta_prefill import ChunkCapacity, ChunkSlots, DeltaChunks, chunk_lists
from tests.support.delta_decode import DeltaShape, Tokens, random_tokens


def make_chunks(
    *chunks: ChunkSlots, page_tokens: int = 16, capacity: ChunkCapacity | None = None, device: str = "cpu"
) -> DeltaChunks:
    lists = chunk_lists(chunks, page_tokens, capacity)
    return DeltaChunks(**{name: torch.tensor(numbers, device=device) for name, numbers in lists.items()})


def random_prompt(shape: DeltaShape, num_tokens: int, seed: int) -> Tokens:
    """Projections of `num_tokens` consecutive tokens."""
    return random_tokens(shape, num_tokens, torch.Generator().manual_seed(seed))


def part(tokens: Tokens, start: int, end: int) -> Tokens:
    return Tokens(*(x[start:end] for x in tokens.all()))


def joined(*prompts: Tokens) -> Tokens:
    """Prompts one behind the other, as the chunks of one step."""
    return Tokens(*(torch.cat(parts) for parts in zip(*(p.all() for p in prompts), strict=True)))
