"""Carries facts from the outbox to Redis, in order, at least once."""

from __future__ import annotations

import asyncio

import structlog
from redis import RedisError
from sqlalchemy.exc import SQLAlchemyError

from kiln_common.bus import keys
from kiln_common.bus.connect import connect_async
from kiln_registry.catalog import Catalog

log = structlog.get_logger()

_BATCH = 100
_STREAM_MAXLEN = 10_000
_RETRY_S = 1.0


class Announcer:
    """Writes each outbox row to the stream ADAPTER_EVENTS and then forgets it.

    An entry has the fields `type`, `data` (a JSON object) and `at_s`. While Redis is away the
    rows wait. A crash between the write and the forgetting repeats an entry: readers are
    idempotent.
    """

    def __init__(self, catalog: Catalog, redis_url: str) -> None:
        self._catalog = catalog
        self._redis = connect_async(redis_url)
        self._has_news = asyncio.Event()
        self._has_news.set()  # what an earlier process left behind

    def wake(self) -> None:
        """There may be new rows; call from the event loop's thread."""
        self._has_news.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        is_away = False
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                try:
                    await self._announce_all()
                except (RedisError, OSError, SQLAlchemyError) as error:
                    if not is_away:
                        log.warning("announcements_wait", reason=str(error))
                    is_away = True
                    self._has_news.set()
                    await asyncio.sleep(_RETRY_S)
                else:
                    if is_away:
                        log.info("announcements_resumed")
                    is_away = False
        finally:
            await self._redis.aclose()

    async def _announce_all(self) -> None:
        while events := await asyncio.to_thread(self._catalog.read_outbox, _BATCH):
            for event in events:
                await self._redis.xadd(
                    keys.ADAPTER_EVENTS,
                    {"type": event.type, "data": event.data_json, "at_s": repr(event.at_s)},
                    maxlen=_STREAM_MAXLEN,
                    approximate=True,
                )
                await asyncio.to_thread(self._catalog.clear_outbox, event.id)
