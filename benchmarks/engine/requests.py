"""Requests with random prompts, as the servicer would hand them to the loop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams

_request_numbers = itertools.count(1)


def random_prompt(num_tokens: int, vocab_size: int, seed: object) -> tuple[int, ...]:
    """Token ids; the same seed gives the same ones, and another seed shares no prefix with it."""
    source = random.Random(repr(seed))
    return tuple(source.choices(range(vocab_size), k=num_tokens))


def make_request(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    seed: int = 0,
    adapter: str | None = None,
    temperature: float = 1.0,
    salt: str = "",
) -> GenerationRequest:
    """A request that runs to `max_tokens`, drawing with its own seed from the whole vocabulary.

    Requests of different `salt` share nothing through the prefix cache.
    """
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=True,
    )
    adapters = (AdapterUse(adapter),) if adapter else ()
    return GenerationRequest(
        f"bench-{next(_request_numbers)}", tuple(prompt), sampling, adapters=adapters, cache_salt=salt
    )


def random_requests(
    count: int, prompt_tokens: int, max_tokens: int, vocab_size: int, seed: object
) -> list[GenerationRequest]:
    """`count` requests with prompts that have nothing in common."""
    return [
        make_request(random_prompt(prompt_tokens, vocab_size, (seed, index)), max_tokens, seed=index)
        for index in range(count)
    ]
