"""Rates and quotas of keys, counted in Redis, so that they hold over all gateways together.

Each limit is a bucket that refills evenly: a minute's (or day's) worth at once, and then as much as
flows in. A request takes one from its bucket. Tokens are taken when they are known, at a request's
end, and may leave a debt; what is asked before is that there is one left.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import structlog
from redis.exceptions import RedisError

from kiln_common.api_keys import Caller
from kiln_common.bus import keys
from kiln_common.errors import ErrorKind, KilnError

log = structlog.get_logger()

_MINUTE_S, _DAY_S = 60, 24 * 3600
# KEYS: buckets. ARGV: 1 where all of them must have room, else 0; then of each its capacity, the
# seconds in which it fills and what to take. Answers with the number of the bucket that lacks most
# time (0: none, it was taken) and that time.
_TAKE = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local levels, longest, which = {}, 0, 0
for i = 1, #KEYS do
  local capacity, period, cost = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  local state = redis.call('HMGET', KEYS[i], 'level', 'at')
  local level = capacity
  if state[1] then
    local since = math.max(0, now - tonumber(state[2]))
    level = math.min(capacity, tonumber(state[1]) + since * capacity / period)
  end
  levels[i] = level
  local wait = (math.max(cost, 1) - level) * period / capacity
  if wait > longest then longest, which = wait, i end
end
if ARGV[1] == '1' and which > 0 then return {which, tostring(longest)} end
for i = 1, #KEYS do
  local capacity, period, cost = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  local level = levels[i] - cost
  redis.call('HSET', KEYS[i], 'level', tostring(level), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', KEYS[i], math.ceil((capacity - level) * period / capacity) + 1)
end
return {0, '0'}
"""


class RateLimited(KilnError):
    """The key has used up one of its limits."""

    code = "rate_limited"
    kind = ErrorKind.RATE_LIMITED
    hint = "Try again after Retry-After seconds, or ask for a key with a higher limit."


class RateLimiter:
    """`redis` is a redis.asyncio client, or None. While Redis is away nobody is limited."""

    def __init__(self, redis: Any) -> None:
        self._take = redis.register_script(_TAKE) if redis is not None else None
        self._charges: set[asyncio.Task[None]] = set()
        self._is_away = False  # so that one outage is one line in the log

    async def admit(self, caller: Caller) -> None:
        """Count a request. Raises RateLimited, with the seconds until there is room."""
        requests = caller.limits.requests_per_minute
        buckets = [("requests_per_minute", requests, _MINUTE_S, 1)] if requests else []
        buckets += _token_buckets(caller, 0)
        which, wait_s = await self._run(caller, buckets, must_fit=True)
        if which:
            name, capacity, *_ = buckets[which - 1]
            raise RateLimited(
                f"the key may use {capacity} {name.replace('_', ' ')}; there is room in {wait_s:.1f} s",
                retry_after_s=max(wait_s, 0.001),
            )

    def charge(self, caller: Caller, num_tokens: int) -> None:
        """Count tokens that were used; returns at once."""
        buckets = _token_buckets(caller, num_tokens)
        if buckets:
            task = asyncio.create_task(self._charge(caller, buckets))
            self._charges.add(task)
            task.add_done_callback(self._charges.discard)

    async def settle(self) -> None:
        """Wait until everything charged so far is counted."""
        await asyncio.gather(*self._charges)

    async def _charge(self, caller: Caller, buckets: list[tuple[str, int, int, int]]) -> None:
        await self._run(caller, buckets, must_fit=False)

    async def _run(
        self, caller: Caller, buckets: list[tuple[str, int, int, int]], *, must_fit: bool
    ) -> tuple[int, float]:
        if self._take is None or not buckets:
            return 0, 0.0
        names = [keys.key_limit(caller.owner, name) for name, *_ in buckets]
        numbers = [number for _, *bucket in buckets for number in bucket]
        try:
            which, wait_s = await self._take(keys=names, args=[int(must_fit), *numbers])
        except (RedisError, OSError) as error:
            if not self._is_away:
                log.warning("limits_not_checked", error=str(error))
            self._is_away = True
            return 0, 0.0
        self._is_away = False
        return int(which), math.ceil(float(wait_s) * 1000) / 1000


def _token_buckets(caller: Caller, num_tokens: int) -> list[tuple[str, int, int, int]]:
    """Name, capacity, seconds and cost of each token limit that the caller has."""
    limits = caller.limits
    buckets = [
        ("tokens_per_minute", limits.tokens_per_minute, _MINUTE_S, num_tokens),
        ("tokens_per_day", limits.tokens_per_day, _DAY_S, num_tokens),
    ]
    return [bucket for bucket in buckets if bucket[1]]
