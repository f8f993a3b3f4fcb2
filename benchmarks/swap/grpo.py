"""From the POST of a GRPO job to the first token of the version it makes, cut at the job's events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

_PROMPT = [{"role": "user", "content": "Write a short, friendly email reply."}]
_TIMEOUT_S = 300.0


class JobFailed(Exception):
    """The job did not end well."""


async def time_job(url: str, adapter: str, *, num_rollouts: int, max_tokens: int) -> dict[str, float]:
    """Sample, score and post by completion id; seconds from the POST to each event that follows.

    `first token` is that of the first answer by the new version, to a request that was sent when its
    "published" event arrived.

    Raises:
        JobFailed, httpx.HTTPError.
    """
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as http:
        rollouts = await _sample(http, num_rollouts, max_tokens)
        began_s = time.time()
        response = await http.post(
            "/v1/train/grpo", json={"adapter": adapter, "groups": [{"rollouts": rollouts}]}
        )
        response.raise_for_status()
        seconds = {"accepted": time.time() - began_s}
        first_token: asyncio.Task[float] | None = None
        async for event in _events(http, response.json()["id"]):
            seconds[event["type"]] = event["at_s"] - began_s
            if event["type"] == "published":
                seconds["published event read"] = time.time() - began_s
                wanted = f"{adapter}@{event['version']}"
                first_token = asyncio.create_task(_first_token_of(http, adapter, wanted))
            if event["type"] in ("failed", "cancelled"):
                raise JobFailed(str(event))
        if first_token is None:
            raise JobFailed("it published nothing")
        seconds["first token"] = await first_token - began_s
        return seconds


async def _sample(http: httpx.AsyncClient, count: int, max_tokens: int) -> list[dict[str, Any]]:
    body = {"messages": _PROMPT, "n": count, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0}
    response = await http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    completion_id = response.json()["id"]
    return [
        {"completion_id": completion_id, "index": index, "reward": float(index % 2)} for index in range(count)
    ]


async def _events(http: httpx.AsyncClient, job_id: str) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("GET", f"/v1/train/jobs/{job_id}/events") as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])


async def _first_token_of(http: httpx.AsyncClient, adapter: str, wanted: str) -> float:
    """When the first token came; the first request must get the wanted version."""
    body = {"model": adapter, "messages": _PROMPT, "max_tokens": 1, "stream": True, "store": False}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        if response.headers["X-Kiln-Adapter"] != wanted:
            raise JobFailed(f"{response.headers['X-Kiln-Adapter']} answered after {wanted} was published")
        came_s = 0.0
        async for line in response.aiter_lines():
            if line.startswith("data: {") and not came_s:
                came_s = time.time()
        return came_s
