"""Hears on Redis of new versions and of rollbacks, and fetches before the first request names them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import structlog

from kiln_common.bus import keys
from kiln_common.bus.connect import REDIS_AWAY, connect_async
from kiln_common.errors import KilnError
from kiln_engine.adapters.manager import AdapterManager
from kiln_engine.domain.adapter import AdapterVersion, Rollback

log = structlog.get_logger()

_BLOCK_MS = 2000
_RETRY_S = 1.0


class AdapterEvents:
    """Follows the stream ADAPTER_EVENTS from the moment it starts.

    A lost event costs freshness, nothing else: AdapterRefresh finds what the registry points at.
    """

    def __init__(self, redis_url: str, manager: AdapterManager) -> None:
        self._redis = connect_async(redis_url)
        self._manager = manager
        self._last_id: bytes | str = "$"

    async def run(self) -> None:
        """Follow until cancelled."""
        is_away = False
        try:
            while True:
                try:
                    answer = await self._redis.xread({keys.ADAPTER_EVENTS: self._last_id}, block=_BLOCK_MS)
                except REDIS_AWAY as error:
                    if not is_away:
                        log.warning("adapter_events_wait_for_redis", reason=str(error))
                    is_away = True
                    await asyncio.sleep(_RETRY_S)
                    continue
                is_away = False
                streams: Any = answer or ()
                for _, entries in streams:
                    for entry_id, fields in entries:
                        self._last_id = entry_id
                        await self._handle(fields)
        finally:
            await self._redis.aclose()

    async def _handle(self, fields: dict[bytes, bytes]) -> None:
        if fields.get(b"type") not in (b"AdapterPublished", b"AdapterRolledBack"):
            return
        try:
            data = json.loads(fields[b"data"])
            version = AdapterVersion(str(data["name"]), int(data["version"]), str(data["sha256"]))
            passed_over = int(data.get("rolled_back_over", 0))
        except (KeyError, ValueError, TypeError) as error:
            log.warning("adapter_event_unreadable", reason=str(error))
            return
        try:
            if passed_over:
                await self._manager.turn_back(Rollback(version, passed_over))
            else:
                await self._manager.prepare(version)
        except KilnError as error:
            log.info("adapter_not_prefetched", adapter=version.reference, code=error.code)
