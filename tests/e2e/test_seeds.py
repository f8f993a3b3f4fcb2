"""A seeded request gets one answer, whatever runs beside it (on the CPU, in float32)."""

import asyncio
import random

import httpx
import pytest

pytestmark = pytest.mark.processes

SEEDED = {
    "model": "base",
    "messages": [{"role": "user", "content": "Write a short, friendly email reply."}],
    "temperature": 1.0,
    "seed": 1234,
    "max_tokens": 24,
    "logprobs": True,
}


async def test_the_same_seed_fifty_times_among_random_traffic_gives_one_answer(stack):
    draw = random.Random(5)

    async with httpx.AsyncClient(base_url=f"{stack.url}/v1", timeout=120) as http:

        async def noise():
            while not is_over.is_set():
                words = " ".join(
                    draw.choice(["thank", "you", "letter", "two", "seven"])
                    for _ in range(draw.randrange(1, 60))
                )
                body = {
                    "prompt": words,
                    "max_tokens": draw.randrange(1, 30),
                    "temperature": draw.choice([0, 1, 1.5]),
                }
                (await http.post("/completions", json=body)).raise_for_status()

        async def answer():
            choice = (
                (await http.post("/chat/completions", json=SEEDED)).raise_for_status().json()["choices"][0]
            )
            return choice["message"]["content"]

        is_over = asyncio.Event()
        traffic = [asyncio.create_task(noise()) for _ in range(6)]
        try:
            answers = []
            for size in (1, 2, 5, 8, 1, 12, 3, 10, 8):
                answers += await asyncio.gather(*(answer() for _ in range(size)))
        finally:
            is_over.set()
            await asyncio.gather(*traffic)
        other = dict(SEEDED, seed=4321)
        different = (await http.post("/chat/completions", json=other)).json()["choices"][0]["message"][
            "content"
        ]
    assert len(answers) == 50
    assert len(set(answers)) == 1
    assert different != answers[0]
