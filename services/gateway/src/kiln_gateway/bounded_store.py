"""Records in Redis, each for a while and all of a kind together within a number of bytes."""

from __future__ import annotations

import time
from typing import Any

import structlog
from redis.exceptions import RedisError

from kiln_common.errors import QueueUnavailable

log = structlog.get_logger()

# Keeps one record, its place in the order of age and the sum of bytes, and makes room by dropping
# the oldest. KEYS: record, index, bytes, match list or "". ARGV: payload, ttl_s, now_s, max_bytes,
# member of the match list, matches kept.
_SAVE = """
local function forget(entry)
  local cut = string.find(entry, '|', 1, true)
  redis.call('DECRBY', KEYS[3], string.sub(entry, 1, cut - 1))
  return string.sub(entry, cut + 1)
end
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[3] - ARGV[2])) do
  forget(entry)
  redis.call('ZREM', KEYS[2], entry)
end
local size = string.len(ARGV[1])
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], size .. '|' .. KEYS[1])
local total = redis.call('INCRBY', KEYS[3], size)
while total > tonumber(ARGV[4]) do
  local oldest = redis.call('ZPOPMIN', KEYS[2])
  if #oldest == 0 then redis.call('SET', KEYS[3], 0) break end
  redis.call('DEL', forget(oldest[1]))
  total = tonumber(redis.call('GET', KEYS[3]))
end
redis.call('EXPIRE', KEYS[2], ARGV[2] * 2)
redis.call('EXPIRE', KEYS[3], ARGV[2] * 2)
if KEYS[4] ~= '' then
  redis.call('LPUSH', KEYS[4], ARGV[5])
  redis.call('LTRIM', KEYS[4], 0, ARGV[6] - 1)
  redis.call('EXPIRE', KEYS[4], ARGV[2])
end
return total
"""


class BoundedStore:
    """Records under their keys, each for `ttl_s` seconds and together at most `max_bytes`; the oldest give way.

    `redis` is a redis.asyncio client, or None: then nothing is kept.
    """

    def __init__(self, redis: Any, *, index_key: str, bytes_key: str, ttl_s: int, max_bytes: int) -> None:
        self.redis = redis
        self._index_key = index_key
        self._bytes_key = bytes_key
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._save = redis.register_script(_SAVE) if redis is not None else None

    async def save(self, key: str, payload: bytes, *, match_list: str = "", matches_kept: int = 0) -> bool:
        """Keep a record, and its key at the head of `match_list`; False when it could not be kept."""
        if self._save is None or len(payload) > self._max_bytes:
            return False
        try:
            await self._save(
                keys=[key, self._index_key, self._bytes_key, match_list],
                args=[payload, self._ttl_s, time.time(), self._max_bytes, key, matches_kept],
            )
        except (RedisError, OSError) as error:
            log.warning("record_not_kept", key=key, error=str(error))
            return False
        return True

    async def read(self, record_keys: list[str]) -> list[bytes | None]:
        """What is kept under these keys. Raises QueueUnavailable without Redis."""
        if self.redis is None:
            raise QueueUnavailable("the gateway runs without Redis, so nothing is kept between requests")
        try:
            return await self.redis.mget(record_keys)
        except (RedisError, OSError) as error:
            raise QueueUnavailable(f"Redis does not answer: {error}") from error

    async def delete(self, key: str) -> None:
        """Forget a record; its bytes count until its time is over. Raises QueueUnavailable."""
        try:
            await self.redis.delete(key)
        except (RedisError, OSError) as error:
            raise QueueUnavailable(f"Redis does not answer: {error}") from error
