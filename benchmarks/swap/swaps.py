"""Many swaps of one adapter name under load, every token checked against the version it is said to be of."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.swap.clients import TIMEOUT_S, Answers, Load, running
from benchmarks.swap.telling_adapters import TellingAdapters
from kiln_common.clients.engine import EngineClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.pb import registry_pb2
from kiln_trainer.publishing import EngineDirectory, GrpcPublisher

NAME = "teller"
# Older ones are deleted, so that a thousand of them fit on a disk.
_VERSIONS_KEPT = 24
_PROGRESS_INTERVAL_S = 15.0


@dataclass
class SwapReport:
    """Seconds of each swap, in order; `publish_s` up to the registry's answer, `swap_s` from there on."""

    publish_s: list[float] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    # Of a request at a time when nothing is swapped: what the load alone costs.
    ordinary_s: list[float] = field(default_factory=list)
    answers: Answers = field(default_factory=Answers)


async def first_token(http: httpx.AsyncClient, name: str) -> tuple[int, float]:
    """The version that drew the first token of a new answer, and when it came (perf_counter)."""
    message = {"role": "user", "content": "Which one are you?"}
    body = {"model": name, "messages": [message], "max_tokens": 1, "stream": True, "store": False}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        came_s = 0.0
        async for line in response.aiter_lines():
            if line.startswith("data: {") and not came_s:
                came_s = time.perf_counter()
        return int(response.headers["X-Kiln-Adapter"].partition("@")[2]), came_s


@dataclass(frozen=True)
class StackAddresses:
    """Where a running stack listens."""

    url: str
    engine: str
    registry: str

    @classmethod
    def of(cls, url: str, state_dir: Path) -> StackAddresses:
        run_dir = state_dir / "run"
        return cls(url, f"unix:{run_dir}/engine.sock", f"unix:{run_dir}/registry.sock")


class Swapper:
    """Publishes version after version as the trainer does, but for the training."""

    def __init__(self, addresses: StackAddresses, adapters: TellingAdapters, name: str = NAME) -> None:
        self._adapters = adapters
        self._name = name
        self._registry = RegistryClient(addresses.registry)
        self._engine = EngineClient(addresses.engine)
        self._engines = EngineDirectory([addresses.engine], info_timeout_s=10, live_timeout_s=30)
        self._publisher = GrpcPublisher(self._registry, self._engines, asyncio.get_running_loop())
        self.newest = 0

    async def close(self) -> None:
        await self._engines.close()
        await self._engine.close()
        await self._registry.close()

    async def swap(self) -> tuple[float, float]:
        """Publish the next version; returns the seconds to the commit and from there to its serving."""
        number = self.newest + 1
        base_model = (await self._engine.get_info()).base_model
        content = await asyncio.to_thread(self._adapters.sealed, number, base_model.model_id)
        header = registry_pb2.PublishHeader(
            name=self._name,
            base_model_hash=base_model.model_hash,
            config_json=content.config_json,
            publish_key=f"{self._name}-{number}",
        )
        began_s = time.perf_counter()
        version = await asyncio.to_thread(self._publisher.publish, header, content)
        committed_s = time.perf_counter()
        report = await asyncio.to_thread(self._publisher.make_live, version)
        content.close()
        self.newest = number
        assert version.version == number, version
        assert not report.not_live, report
        if number > _VERSIONS_KEPT:
            await self._registry.delete(self._name, number - _VERSIONS_KEPT)
        return committed_s - began_s, report.seconds


async def run_swaps(
    addresses: StackAddresses,
    adapters: TellingAdapters,
    *,
    num_swaps: int,
    num_clients: int,
    max_tokens: int,
    most_seconds: float = math.inf,
) -> SwapReport:
    """Swap that often under load, one version after the other, or as often as the time allows."""
    report = SwapReport()
    swapper = Swapper(addresses, adapters)
    load = Load(addresses.url, NAME, adapters.tokens, num_clients, max_tokens)
    async with httpx.AsyncClient(base_url=addresses.url, timeout=TIMEOUT_S) as http:
        try:
            await swapper.swap()  # so that the name exists
            async with running(load, report.answers):
                began_s = shown_s = time.monotonic()
                for number in range(num_swaps):
                    if time.monotonic() - began_s > most_seconds:
                        break
                    if time.monotonic() - shown_s > _PROGRESS_INTERVAL_S:
                        shown_s = time.monotonic()
                        print(f"{number} of {num_swaps} swaps in {shown_s - began_s:.0f} s", flush=True)
                    asked_s = time.perf_counter()
                    report.ordinary_s.append((await first_token(http, NAME))[1] - asked_s)
                    publish_s, swap_s = await swapper.swap()
                    live_s = time.perf_counter()
                    version, came_s = await first_token(http, NAME)
                    assert version == swapper.newest, (version, swapper.newest)
                    report.first_token_s.append(came_s - live_s + swap_s)
                    report.publish_s.append(publish_s)
                    report.swap_s.append(swap_s)
        finally:
            await swapper.close()
    return report
