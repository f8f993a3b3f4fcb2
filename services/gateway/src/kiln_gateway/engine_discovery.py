"""Tells the pool which engines announce themselves on Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.exceptions import RedisError

from kiln_common.bus.engine_presence import RENEW_S, read_words
from kiln_common.ending import end_tasks
from kiln_gateway.engine_pool import EnginePool

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def discovering(redis: Any, pool: EnginePool) -> AsyncIterator[None]:
    """Keep the pool informed while the block runs; without Redis it stays with what it knows."""
    task = asyncio.create_task(_follow(redis, pool)) if redis is not None else None
    try:
        yield
    finally:
        if task is not None:
            await end_tasks(task)


async def _follow(redis: Any, pool: EnginePool) -> None:
    is_away = False
    while True:
        try:
            await pool.hear(await read_words(redis))
            is_away = False
        except (RedisError, OSError) as error:
            if not is_away:
                log.warning("engines_not_looked_up", reason=str(error))
            is_away = True
        except Exception as error:  # a bug here must not end the gateway's search for engines
            log.error("engine_discovery_failed", exc_info=error)
        await asyncio.sleep(RENEW_S)
