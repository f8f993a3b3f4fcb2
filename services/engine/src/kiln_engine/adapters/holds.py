"""Tells the registry which versions requests run on, so that none of them is collected."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

import structlog

from kiln_common.errors import KilnError
from kiln_engine.domain.ports import AdapterResidency

log = structlog.get_logger()

# A version that was looked up is safe for a minute anyway; a hold outlives a few lost reports.
_INTERVAL_S = 10.0
_HELD_S = 60.0


class HoldingRegistry(Protocol):
    async def hold(self, holder: str, references: Iterable[str], *, for_s: float) -> None: ...


class AdapterHolds:
    """Reports under this engine's boot id, as long as there is something to report or to let go."""

    def __init__(self, registry: HoldingRegistry, adapters: AdapterResidency, boot_id: str) -> None:
        self._registry = registry
        self._adapters = adapters
        self._boot_id = boot_id
        self._holds_something = False

    async def run(self) -> None:
        """Report every few seconds, until cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(_INTERVAL_S)

    async def report(self) -> None:
        """Report once; the registry being away costs nothing but this report."""
        pinned = [each.adapter.reference for each in self._adapters.resident if each.num_pins]
        if not pinned and not self._holds_something:
            return
        try:
            await self._registry.hold(self._boot_id, pinned, for_s=_HELD_S)
        except KilnError as error:
            log.info("adapters_not_held", code=error.code, reason=str(error))
        else:
            self._holds_something = bool(pinned)
