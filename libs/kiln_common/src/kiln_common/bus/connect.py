"""Redis clients with the limits every Kiln process uses."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

# What redis-py raises when the server is away (or still loading its file): wait or degrade.
REDIS_AWAY: tuple[type[Exception], ...] = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.BusyLoadingError,
    OSError,
)


def connect(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A thread-safe client; it connects, and reconnects, when it is used.

    It never retries by itself: a command whose answer was lost may have taken effect, and only
    the caller knows whether it may be repeated.
    """
    return redis.Redis.from_url(url, **_options(timeout_s), retry=Retry(NoBackoff(), 0))


def connect_async(url: str, *, timeout_s: float = 5.0) -> redis.asyncio.Redis:
    """The same for asyncio. Blocking reads must block for less than `timeout_s`."""
    return redis.asyncio.Redis.from_url(url, **_options(timeout_s), retry=AsyncRetry(NoBackoff(), 0))


def _options(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "decode_responses": False}
