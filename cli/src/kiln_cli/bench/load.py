"""Streams many answers at once from a server and measures when their tokens come."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kiln

# A common English word is one token in any vocabulary of this family, give or take.
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


@dataclass(frozen=True)
class Load:
    """What is asked: `num_requests` in all, `concurrency` of them at any moment."""

    num_requests: int
    concurrency: int
    prompt_words: int
    max_tokens: int
    model: str | None


@dataclass(frozen=True)
class Measured:
    """One answer. Times are seconds from its request; empty when it failed."""

    token_times_s: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    error: str


def run(url: str | None, api_key: str | None, load: Load) -> dict[str, Any]:
    """The figures of the whole load; nothing is tried twice."""
    return asyncio.run(_run(url, api_key, load))


async def _run(url: str | None, api_key: str | None, load: Load) -> dict[str, Any]:
    numbers = iter(range(load.num_requests))
    answers: list[Measured] = []
    async with kiln.AsyncClient(url, api_key=api_key) as client:
        await client.models()  # whoever cannot be reached says so before anything is measured

        async def worker() -> None:
            for number in numbers:
                answers.append(await _ask(client, load, number))

        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(load.concurrency)))
        return figures(answers, time.monotonic() - started)


async def _ask(client: kiln.AsyncClient, load: Load, number: int) -> Measured:
    """One streamed answer of exactly `max_tokens` tokens; every prompt begins differently."""
    words = [_WORDS[(number + index) % len(_WORDS)] for index in range(load.prompt_words)]
    body = {
        "messages": [{"role": "user", "content": f"{number} {' '.join(words)}"}],
        "max_tokens": load.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": False,
        **({"model": load.model} if load.model else {}),
    }
    reader = kiln.SseReader()
    times: list[float] = []
    usage: dict[str, int] = {}
    started = time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                chunk = reader.feed(line)
                if chunk is None:
                    continue
                usage = chunk.get("usage") or usage
                if any(_has_text(choice["delta"]) for choice in chunk["choices"]):
                    times.append(time.monotonic() - started)
    except kiln.KilnError as error:
        return Measured((), 0, 0, f"{error.code}: {error.message}")
    return Measured(tuple(times), usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), "")


def _has_text(delta: dict[str, Any]) -> bool:
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def figures(answers: Sequence[Measured], seconds: float) -> dict[str, Any]:
    """Rates over the whole time, and percentiles in milliseconds."""
    good = [answer for answer in answers if not answer.error and answer.token_times_s]
    gaps = [after - before for answer in good for before, after in itertools.pairwise(answer.token_times_s)]
    errors = [answer.error or "no token came" for answer in answers if answer not in good]
    output = sum(answer.output_tokens for answer in good)
    return {
        "requests": len(answers),
        "failed": len(errors),
        "seconds": round(seconds, 3),
        "output_tokens": output,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens_per_s": round(output / seconds, 1) if seconds else 0.0,
        "requests_per_s": round(len(good) / seconds, 2) if seconds else 0.0,
        "first_token_ms": percentiles_ms([answer.token_times_s[0] for answer in good]),
        "between_tokens_ms": percentiles_ms(gaps),
        "first_error": errors[0] if errors else None,
    }


def percentiles_ms(values_s: Sequence[float]) -> dict[str, float] | None:
    """The 50th, 90th and 99th, nearest rank."""
    if not values_s:
        return None
    ranked = sorted(values_s)
    return {
        f"p{rank}": round(1000 * ranked[min(len(ranked) - 1, -(-len(ranked) * rank // 100) - 1)], 2)
        for rank in (50, 90, 99)
    }
