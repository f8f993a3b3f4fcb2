"""Rollbacks of one adapter name under load: how soon the next request's first token is of the older version."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import httpx

from benchmarks.swap.clients import TIMEOUT_S, Answers, Load, running
from benchmarks.swap.swaps import StackAddresses, Swapper, first_token
from benchmarks.swap.telling_adapters import TellingAdapters

NAME = "turned-back"


@dataclass
class RollbackReport:
    """Seconds of each rollback, in order: of its call, and from its POST to the next request's first token."""

    call_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    # Of the request right before it: what the load alone costs.
    ordinary_s: list[float] = field(default_factory=list)
    answers: Answers = field(default_factory=Answers)


async def run_rollbacks(
    addresses: StackAddresses,
    adapters: TellingAdapters,
    *,
    num_rollbacks: int,
    num_clients: int,
    max_tokens: int,
) -> RollbackReport:
    """Publish two versions, then go back to the first; again, that often. Clients never try again.

    Raises:
        AssertionError: a request that was sent after a rollback was answered by another version.
    """
    report = RollbackReport()
    swapper = Swapper(addresses, adapters, NAME)
    load = Load(addresses.url, NAME, adapters.tokens, num_clients, max_tokens)
    async with httpx.AsyncClient(base_url=addresses.url, timeout=TIMEOUT_S) as http:
        try:
            await swapper.swap()  # so that the name exists
            async with running(load, report.answers):
                for _ in range(num_rollbacks):
                    older = swapper.newest
                    await swapper.swap()
                    sent_s = time.perf_counter()
                    version, came_s = await first_token(http, NAME)
                    assert version == swapper.newest, (version, swapper.newest)
                    report.ordinary_s.append(came_s - sent_s)
                    asked_s = time.perf_counter()
                    response = await http.post(f"/v1/adapters/{NAME}/rollback", json={"version": older})
                    response.raise_for_status()
                    report.call_s.append(time.perf_counter() - asked_s)
                    version, came_s = await first_token(http, NAME)
                    assert version == older, (version, older)
                    report.first_token_s.append(came_s - asked_s)
        finally:
            await swapper.close()
    return report
