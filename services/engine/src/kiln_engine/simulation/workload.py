"""Seeded requests that look like chat: a few system prompts, turns that build on each other, groups."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kiln_engine.domain.request import AdapterUse, GenerationRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """How many of what."""

    num_requests: int = 200
    num_system_prompts: int = 4
    num_adapters: int = 2
    vocab_size: int = 1000
    most_prompt_tokens: int = 400
    most_output_tokens: int = 120
    # Share of requests that continue an earlier prompt.
    follow_up_share: float = 0.5
    # Seconds between two arrivals, on average.
    mean_gap_s: float = 0.01


def make_workload(shape: WorkloadShape, seed: int) -> list[GenerationRequest]:
    """Requests in order of arrival; the same seed makes the same ones."""
    random_source = random.Random(seed)
    systems = [_tokens(random_source, shape.vocab_size, 64) for _ in range(shape.num_system_prompts)]
    histories: list[tuple[int, ...]] = []
    requests = []
    arrival_s = 0.0
    for index in range(shape.num_requests):
        arrival_s += random_source.expovariate(1 / shape.mean_gap_s)
        if histories and random_source.random() < shape.follow_up_share:
            start = random_source.choice(histories)
        else:
            start = random_source.choice(systems)
        length = random_source.randint(5, max(6, shape.most_prompt_tokens - len(start)))
        prompt = start + _tokens(random_source, shape.vocab_size, length)
        if len(prompt) < shape.most_prompt_tokens:
            histories.append(prompt)
        adapter = random_source.randint(0, shape.num_adapters)
        requests.append(
            GenerationRequest(
                f"request-{index}",
                prompt,
                SamplingParams(
                    max_tokens=random_source.randint(1, shape.most_output_tokens), seed=index, ignore_eos=True
                ),
                adapters=(AdapterUse(f"adapter-{adapter}"),) if adapter else (),
                num_stable_prefix_tokens=len(prompt),
                arrival_s=arrival_s,
            )
        )
    return requests


def adapter_slots_of(request: GenerationRequest) -> tuple[tuple[int, float], ...]:
    """Slots of the workload's adapters: adapter-n is in slot n."""
    return tuple((int(use.sha256.rsplit("-", 1)[1]), use.scale) for use in request.adapters)


def _tokens(random_source: random.Random, vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(random_source.randrange(vocab_size) for _ in range(count))
