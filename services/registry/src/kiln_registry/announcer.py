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
_RETRY_S = 0.5
_STOP_S = 2.0


class Announcer:
    """Writes each outbox row to the stream ADAPTER_EVENTS and then forgets it.

    An entry has the fields `id`, `type`, `data` (a JSON object) and `at_s`. While Redis is away
    the rows wait. A crash between the write and the forgetting repeats an entry with the same id:
    readers are idempotent.
    """

    def __init__(self, catalog: Catalog, redis_url: str) -> None:
        self._catalog = catalog
        self._redis = connect_async(redis_url)
        self._has_news = asyncio.Event()
        self._has_news.set()  # what an earlier process left behind
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to announce, on the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End within a few seconds; what is not announced yet stays in the outbox.

        A flag comes first: up to Python 3.11, asyncio.wait_for (which redis-py uses) can lose a
        cancellation.
        """
        self._is_stopping = True
        self._has_news.set()
        if self._task is not None:
            _, pending = await asyncio.wait({self._task}, timeout=_STOP_S)
            for task in pending:
                task.cancel()
                await asyncio.wait({task}, timeout=_STOP_S)

    def wake(self) -> None:
        """There may be new rows; call from the event loop's thread."""
        self._has_news.set()

    async def _run(self) -> None:
        is_away = False
        try:
            while not self._is_stopping:
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
                if self._is_stopping:
                    return
                await self._redis.xadd(
                    keys.ADAPTER_EVENTS,
                    {
                        "id": event.id,
                        "type": event.type,
                        "data": event.data_json,
                        "at_s": repr(event.at_s),
                    },
                    maxlen=_STREAM_MAXLEN,
                    approximate=True,
                )
                await asyncio.to_thread(self._catalog.clear_outbox, event.id)
