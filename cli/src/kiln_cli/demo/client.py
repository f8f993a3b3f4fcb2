"""A small HTTP client that never retries and counts every attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Sample:
    """One sampled answer, and where its rollout is kept."""

    prompt: str
    text: str
    completion_id: str
    index: int
    adapter: str  # "name@version" or "base"


@dataclass
class CountingClient:
    """Talks to the gateway; `num_failed` counts every attempt that did not end well."""

    base_url: str
    num_requests: int = 0
    num_failed: int = 0
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        transport = httpx.AsyncHTTPTransport(retries=0, limits=httpx.Limits(max_connections=128))
        self._http = httpx.AsyncClient(base_url=self.base_url, transport=transport, timeout=120.0)

    async def close(self) -> None:
        await self._http.aclose()

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One counted attempt; raises httpx.HTTPError when it fails."""
        self.num_requests += 1
        try:
            response = await self._http.request(method, path, **options)
            response.raise_for_status()
        except httpx.HTTPError as error:
            self._failed(method, path, error)
            raise
        return response

    def _failed(self, method: str, path: str, error: httpx.HTTPError) -> None:
        self.num_failed += 1
        body = error.response.text[:300] if isinstance(error, httpx.HTTPStatusError) else ""
        self.failures.append(f"{method} {path}: {error!r} {body}".strip())

    async def sample(self, prompt: str, *, model: str, count: int, max_tokens: int) -> list[Sample]:
        """`count` answers to one user message at temperature 1, drawn by `model`."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "n": count,
            "temperature": 1.0,
            "max_tokens": max_tokens,
        }
        response = await self.request("POST", "/v1/chat/completions", json=body)
        answer, adapter = response.json(), response.headers["X-Kiln-Adapter"]
        return [
            Sample(prompt, choice["message"]["content"] or "", answer["id"], choice["index"], adapter)
            for choice in answer["choices"]
        ]

    async def first_token(self, prompt: str, *, model: str) -> str:
        """The adapter that answered, as soon as the first token of a streamed answer is there."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "stream": True,
            "store": False,
        }
        self.num_requests += 1
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith('data: {"error"'):
                        raise httpx.RemoteProtocolError(line)
                return response.headers["X-Kiln-Adapter"]
        except httpx.HTTPError as error:
            self._failed("POST", "/v1/chat/completions (stream)", error)
            raise

    async def job_events(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """The job's events as they happen, until it has ended: {"type", "at_s", …details}."""
        self.num_requests += 1
        try:
            async with self._http.stream(
                "GET", f"/v1/train/jobs/{job_id}/events", timeout=httpx.Timeout(300.0)
            ) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except httpx.HTTPError as error:
            self._failed("GET", f"/v1/train/jobs/{job_id}/events", error)
            raise


async def keep_chatting(client: CountingClient, prompts: list[str], stop: asyncio.Event) -> None:
    """Ordinary traffic on the deployment's default weights until `stop` is set."""
    turn = 0
    while not stop.is_set():
        body = {"messages": [{"role": "user", "content": prompts[turn % len(prompts)]}], "max_tokens": 32}
        turn += 1
        try:
            await client.request("POST", "/v1/chat/completions", json={**body, "store": False})
        except httpx.HTTPError:
            # Counted. A pause of a moment, so that an outage is not hammered.
            await asyncio.sleep(0.05)
