"""Lets an adapter that was handed over ahead serve as soon as the registry has committed it."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from kiln_common.errors import KilnError
from kiln_common.pb import registry_pb2
from kiln_engine.adapters.manager import AdapterManager

log = structlog.get_logger()

# From the hand-over to the commit: as long as a large adapter travels to the registry and onto its disk.
_PATIENCE_S = 60.0


class CommitNotice(Protocol):
    """Says when a version is committed: the registry's client."""

    async def await_publish(
        self, name: str, sha256: str, *, timeout_s: float
    ) -> registry_pb2.AdapterVersion: ...


class Publications:
    """Waits at the registry for the versions whose bytes came ahead, one call for each.

    A word that does not come costs time, nothing else: whoever published a version asks for it as well.
    """

    def __init__(self, registry: CommitNotice, manager: AdapterManager) -> None:
        self._registry = registry
        self._manager = manager
        self._expected: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def expect(self, name: str, sha256: str) -> None:
        """These bytes are being handed over and are about to be published under the name."""
        self._expected.put_nowait((name, sha256))

    async def run(self) -> None:
        """Wait for what is expected, until cancelled."""
        async with asyncio.TaskGroup() as waiting:
            while True:
                waiting.create_task(self._serve_when_published(*await self._expected.get()))

    async def _serve_when_published(self, name: str, sha256: str) -> None:
        try:
            record = await self._registry.await_publish(name, sha256, timeout_s=_PATIENCE_S)
            await self._manager.take_over(record)
        except KilnError:
            return  # not published, or the manager has said what is wrong
        except Exception as error:  # such as a device without memory: others are waited for all the same
            log.error("adapter_not_taken_over", adapter=name, exc_info=error)
