"""Generates from twenty JSON schemas at temperature 1 and counts what ended, and what is valid.

    .venv/bin/python -m benchmarks.structured_output --generations 500

Needs the test tools (jsonschema). The demo model answers in an engine and a gateway of this process,
half of the answers streamed. Prints one line a schema and the sums, and exits with 1 when an answer
that ended by itself is not valid, or too few of the bounded ones ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from benchmarks.output_schemas import SCHEMAS, NamedSchema
from tests.support.demo_serving import demo_gateway
from tests.support.gateway import parse_events

_LEAST_BOUNDED_STOPPED = 0.95
_PROMPT = "Send me the data as JSON, please."


@dataclass
class Tally:
    """What became of one schema's answers, by finish reason, and those that are not valid."""

    reasons: Counter[str] = field(default_factory=Counter)
    invalid: list[str] = field(default_factory=list)
    num_tokens: int = 0


async def generate(
    http: httpx.AsyncClient, item: NamedSchema, seed: int, max_tokens: int
) -> tuple[str, str, int]:
    """One answer: its text, finish reason and number of tokens. Odd seeds stream."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": _PROMPT}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "data", "schema": item.schema}},
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": max_tokens,
        "reasoning_effort": "none",
    }
    if seed % 2 == 0:
        answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
        [choice] = answer["choices"]
        return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = (await http.post("/v1/chat/completions", json=body)).raise_for_status()
    *chunks, last, done = parse_events(response.text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0] for chunk in chunks]
    content = "".join(delta["delta"].get("content") or "" for delta in deltas)
    return content, deltas[-1]["finish_reason"], last["usage"]["completion_tokens"]


async def measure(
    num_generations: int, max_tokens: int, num_at_once: int, run_ahead: int
) -> dict[str, Tally]:
    tallies = {item.name: Tally() for item in SCHEMAS}
    turns = asyncio.Semaphore(num_at_once)

    async def one(http: httpx.AsyncClient, item: NamedSchema, seed: int) -> None:
        async with turns:
            text, reason, num_tokens = await generate(http, item, seed, max_tokens)
        tally = tallies[item.name]
        tally.reasons[reason] += 1
        tally.num_tokens += num_tokens
        if reason == "stop" and not _is_valid(text, item.schema):
            tally.invalid.append(text)

    with tempfile.TemporaryDirectory() as folder:
        async with demo_gateway(Path(folder), run_ahead=run_ahead) as http:
            jobs = ((SCHEMAS[i % len(SCHEMAS)], i // len(SCHEMAS)) for i in range(num_generations))
            await asyncio.gather(*(one(http, item, seed) for item, seed in jobs))
    return tallies


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--generations", type=int, default=500)
    options.add_argument("--max-tokens", type=int, default=512)
    options.add_argument("--at-once", type=int, default=24)
    options.add_argument("--run-ahead", type=int, choices=(0, 1), default=0)
    chosen = options.parse_args()
    started_s = time.monotonic()
    tallies = asyncio.run(measure(chosen.generations, chosen.max_tokens, chosen.at_once, chosen.run_ahead))
    bounded: Counter[str] = Counter()
    invalid = []
    for item in SCHEMAS:
        tally = tallies[item.name]
        invalid += tally.invalid
        if item.is_bounded:
            bounded += tally.reasons
        kind = "bounded" if item.is_bounded else "unbounded"
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
        print(
            f"{item.name:26} {kind:10} {reasons:24} {len(tally.invalid)} not valid, {tally.num_tokens} tokens"
        )
    total = sum((tally.reasons for tally in tallies.values()), Counter())
    share = bounded["stop"] / max(1, bounded.total())
    print(f"{total.total()} answers: {total['stop']} stopped, of these {len(invalid)} not valid; other ends:")
    print(f"  {dict(total - Counter(stop=total['stop']))}; of the bounded {share:.1%} stopped")
    print(f"  {time.monotonic() - started_s:.0f} s")
    for text in invalid[:5]:
        print("not valid:", text[:300])
    return int(bool(invalid) or share < _LEAST_BOUNDED_STOPPED)


if __name__ == "__main__":
    sys.exit(main())
