"""Clients that ask for one adapter name's versions, again and again, in a process of their own.

Times are taken in another process: one that also reads eight streams would time its own event loop.
The process is told what to do in a line of JSON on its standard input, says "started", ends when its
input does, and prints what its clients saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

TIMEOUT_S = 60.0
# Beyond the longest of the requests under way.
_END_S = 30.0
# What went wrong is said in one line.
_MOST_BYTES_SAID = 64 << 20
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Answers:
    """What the clients saw. `wrong` and `failures` should stay empty."""

    num_requests: int = 0
    num_tokens: int = 0
    num_mixed: int = 0
    by_version: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def take(self, said: dict) -> None:
        """Take over what a process of clients said."""
        said["by_version"] = Counter({int(version): count for version, count in said["by_version"].items()})
        vars(self).update(said)


@dataclass(frozen=True)
class Load:
    """What the clients do. Version n of the name says `tokens[n % len(tokens)]` at every place."""

    url: str
    name: str
    tokens: Sequence[int]
    num_clients: int
    max_tokens: int


class Client:
    """Asks for a name's version again and again; checks each token; never tries again."""

    def __init__(self, http: httpx.AsyncClient, load: Load, answers: Answers) -> None:
        self._http = http
        self._load = load
        self._answers = answers

    async def run(self, number: int, policy: str, stop: asyncio.Event) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            body = {
                "model": self._load.name,
                # Some prompts repeat, so that cached pages of older versions would be noticed.
                "messages": [{"role": "user", "content": f"Client {number} says {turn % 3}."}],
                "max_tokens": self._load.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "adapter_policy": policy,
                "store": False,
                "stream": turn % 2 == 0,
            }
            try:
                self._check(*await (self._stream(body) if body["stream"] else self._whole(body)))
            except (httpx.HTTPError, KeyError, ValueError) as error:
                answer = error.response.text[:300] if isinstance(error, httpx.HTTPStatusError) else ""
                self._answers.failures.append(f"{error!r} {answer}")
            self._answers.num_requests += 1

    async def _whole(self, body: dict) -> tuple[str, list[int], list[dict]]:
        response = await self._http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        spans = answer["kiln"].get("version_spans", [])
        return response.headers["X-Kiln-Adapter"], answer["choices"][0]["token_ids"], spans

    async def _stream(self, body: dict) -> tuple[str, list[int], list[dict]]:
        tokens: list[int] = []
        spans: list[dict] = []
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(line)
                    for choice in event["choices"]:
                        tokens += choice.get("token_ids", [])
                    spans = event["kiln"].get("version_spans", spans)
            return response.headers["X-Kiln-Adapter"], tokens, spans

    def _check(self, label: str, tokens: list[int], spans: list[dict]) -> None:
        spans = spans or [{"adapter": label, "start": 0, "end": len(tokens)}]
        if [spans[0]["start"], spans[-1]["end"]] != [0, len(tokens)]:
            raise ValueError(f"{len(tokens)} tokens, spans {spans}")
        for span in spans:
            version = int(span["adapter"].partition("@")[2])
            wanted = self._load.tokens[version % len(self._load.tokens)]
            found = tokens[span["start"] : span["end"]]
            if any(token != wanted for token in found):
                self._answers.wrong.append(f"{span['adapter']} should say {wanted}, said {found}")
            self._answers.by_version[version] += len(found)
        self._answers.num_tokens += len(tokens)
        self._answers.num_mixed += len(spans) > 1


@contextlib.asynccontextmanager
async def running(load: Load, answers: Answers) -> AsyncIterator[None]:
    """Clients that ask while the block runs, every other one with adapter_policy "latest".

    `answers` has what they saw once the block has ended.

    Raises:
        TimeoutError, OSError, ValueError: their process did not start, or not say what they saw.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.swap.clients"),
        stdin=pipe,
        stdout=pipe,
        cwd=_ROOT,
        limit=_MOST_BYTES_SAID,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        async with asyncio.timeout(TIMEOUT_S):
            if await process.stdout.readline() != b"started\n":
                raise ValueError("the clients' process did not start; its own error is above")
        yield
        process.stdin.close()
        async with asyncio.timeout(TIMEOUT_S + _END_S):
            answers.take(json.loads(await process.stdout.readline()))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            process.kill()
        raise
    finally:
        await process.wait()


async def _run(load: Load, answers: Answers) -> None:
    stop = asyncio.Event()
    async with httpx.AsyncClient(
        base_url=load.url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=load.num_clients)
    ) as http:
        client = Client(http, load, answers)
        tasks = [
            asyncio.create_task(client.run(number, ("pin", "latest")[number % 2], stop))
            for number in range(load.num_clients)
        ]
        print("started", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        stop.set()
        await asyncio.gather(*tasks)


def main() -> None:
    answers = Answers()
    asyncio.run(_run(Load(**json.loads(sys.stdin.readline())), answers))
    print(json.dumps(vars(answers)), flush=True)


if __name__ == "__main__":
    main()
