"""Compares the device's adapters with the registry now and then, so that no event has to arrive."""

from __future__ import annotations

import asyncio
import random
from typing import Protocol

import structlog

from kiln_common.errors import AdapterNotFound, ErrorKind, KilnError
from kiln_common.pb import registry_pb2
from kiln_engine.adapters.manager import AdapterManager
from kiln_engine.domain.adapter import AdapterVersion, Rollback

log = structlog.get_logger()

# Failures that say nothing about the version: it is tried again at the next look.
_PASSING = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMITED, ErrorKind.TIMEOUT})
_JITTER = 0.2


class RegistryTruth(Protocol):
    """What names mean now: the registry's client."""

    async def get_default(self) -> registry_pb2.AdapterVersion | None: ...

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion: ...


class AdapterRefresh:
    """Fetches what the registry points at and nobody told this engine about.

    That is the attached default, and the version that each name on the device means now. A version
    is fetched once for each time something begins to point at it: if it gave way to busier ones
    since, it comes back with the first request that names it.
    """

    def __init__(
        self, registry: RegistryTruth, manager: AdapterManager, base_model_hash: str, interval_s: float
    ) -> None:
        self._registry = registry
        self._manager = manager
        self._base_model_hash = base_model_hash
        self._interval_s = interval_s
        # What each name, and the default under "", pointed at when its version was last fetched.
        self._fetched: dict[str, str] = {}
        self._is_away = False

    async def run(self) -> None:
        """Look at once, then about every `interval_s` seconds, until cancelled."""
        while True:
            await self.look()
            # Engines that were started together do not ask together.
            await asyncio.sleep(self._interval_s * random.uniform(1 - _JITTER, 1 + _JITTER))

    async def look(self) -> None:
        """Compare once and fetch what is new; does nothing while the registry is away."""
        try:
            pointed_at = await self._ask()
        except KilnError as error:
            if not self._is_away:
                log.warning("adapters_not_compared", code=error.code, reason=str(error))
            self._is_away = True
            return
        self._is_away = False
        for name, record in pointed_at.items():
            if self._fetched.get(name) != record.sha256 and await self._fetch(record):
                self._fetched[name] = record.sha256

    async def _ask(self) -> dict[str, registry_pb2.AdapterVersion]:
        found: dict[str, registry_pb2.AdapterVersion] = {}
        for name in sorted({entry.adapter.name for entry in self._manager.resident}):
            try:
                self._add(found, name, await self._registry.resolve(name))
            except KilnError as error:
                if error.code != AdapterNotFound.code:  # deleted since
                    raise
        # Last, so that it stays when there are too few slots for all.
        default = await self._registry.get_default()
        if default is not None:
            self._add(found, "", default)
        return found

    def _add(
        self, found: dict[str, registry_pb2.AdapterVersion], name: str, record: registry_pb2.AdapterVersion
    ) -> None:
        """Leave out versions for the engines of another base model."""
        if record.base_model_hash == self._base_model_hash:
            found[name] = record

    async def _fetch(self, record: registry_pb2.AdapterVersion) -> bool:
        """Make a version resident; False when it should be tried again."""
        version = AdapterVersion(record.name, record.version, record.sha256)
        try:
            if record.rolled_back_over:
                await self._manager.turn_back(Rollback(version, record.rolled_back_over))
            else:
                await self._manager.prepare(version)
        except KilnError as error:
            log.info("adapter_not_prefetched", adapter=version.reference, code=error.code)
            return error.kind not in _PASSING
        return True
