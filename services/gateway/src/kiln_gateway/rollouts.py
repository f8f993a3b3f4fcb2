"""Rollouts: what a completion was, token by token, kept for a while so that training can name it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import structlog
from redis.exceptions import RedisError

from kiln_common.bus import keys
from kiln_common.errors import QueueUnavailable

log = structlog.get_logger()

_MATCHES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class SamplingRecord:
    """How a completion was drawn, as far as training cares."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    has_logit_bias: bool = False
    min_tokens: int = 0
    seed: int = 0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens could not be drawn at all."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.min_tokens > 0

    @property
    def is_reshaped(self) -> bool:
        """Whether penalties or biases changed the distribution in ways training does not repeat."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or self.has_logit_bias
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """One choice of one completion. The lists about completion tokens have one entry a token."""

    completion_id: str
    index: int
    owner: str
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    logprobs: list[float]  # at temperature 1, nothing filtered
    sampled_logprobs: list[float]  # under the distribution the token was drawn from
    sampling: SamplingRecord
    adapter_version: str  # "name@version", or "base"; joined by "," where it changed in between
    finish_reason: str
    model_hash: str  # base model whose tokenizer the ids belong to
    match_key: str = ""  # hash of owner, messages and content; "" when not from chat
    # {"start", "end", "adapter"} of each stretch of tokens, where several versions took part.
    version_spans: list[dict[str, Any]] = field(default_factory=list)
    created_at_s: float = field(default_factory=time.time)

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Rollout:
        body: dict[str, Any] = orjson.loads(raw)
        return cls(**{**body, "sampling": SamplingRecord(**body["sampling"])})


def match_key(owner: str, messages: Sequence[dict[str, Any]], content: str) -> str:
    """What the short GRPO form knows of a completion: who asked, what was asked, what came back."""
    canonical = json.dumps([owner, list(messages), content], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


# Keeps one rollout, its place in the order of age and the sum of bytes, and makes room by dropping
# the oldest. KEYS: rollout, index, bytes, match list or "". ARGV: payload, ttl_s, now_s, max_bytes,
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


class RolloutStore:
    """Rollouts in Redis, each for `ttl_s` seconds and together at most `max_bytes`.

    `redis` is a redis.asyncio client, or None: then nothing is kept and nothing is found.
    """

    def __init__(self, redis: Any, *, ttl_s: int, max_bytes: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._save = redis.register_script(_SAVE) if redis is not None else None

    async def save(self, rollout: Rollout) -> bool:
        """Keep the rollout; False when it could not be kept (no Redis, or larger than all the room)."""
        payload = rollout.to_json()
        if self._save is None or len(payload) > self._max_bytes:
            return False
        key = keys.rollout(rollout.completion_id, rollout.index)
        matches = keys.rollout_matches(rollout.match_key) if rollout.match_key else ""
        try:
            await self._save(
                keys=[key, keys.ROLLOUT_INDEX, keys.ROLLOUT_BYTES, matches],
                args=[payload, self._ttl_s, time.time(), self._max_bytes, key, _MATCHES_KEPT],
            )
        except (RedisError, OSError) as error:
            log.warning("rollout_not_kept", completion_id=rollout.completion_id, error=str(error))
            return False
        return True

    async def find(self, completion_id: str, index: int, owner: str) -> Rollout | None:
        """The rollout, if it is kept and belongs to `owner`. Raises QueueUnavailable without Redis."""
        (found,) = await self._read([keys.rollout(completion_id, index)])
        return found if found is not None and found.owner == owner else None

    async def find_matches(self, key: str) -> list[Rollout]:
        """Every kept rollout with this match key, newest first. Empty without Redis."""
        if self._redis is None:
            return []
        try:
            members = await self._redis.lrange(keys.rollout_matches(key), 0, -1)
        except (RedisError, OSError) as error:
            raise QueueUnavailable(f"Redis does not answer: {error}") from error
        if not members:
            return []
        found = await self._read([member.decode() for member in members])
        return [rollout for rollout in found if rollout is not None]

    async def is_reachable(self) -> bool:
        """Whether Redis answers now."""
        if self._redis is None:
            return False
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            return False
        return True

    async def _read(self, rollout_keys: list[str]) -> list[Rollout | None]:
        if self._redis is None:
            raise QueueUnavailable("the gateway runs without Redis, so no rollouts are kept")
        try:
            payloads = await self._redis.mget(rollout_keys)
        except (RedisError, OSError) as error:
            raise QueueUnavailable(f"Redis does not answer: {error}") from error
        return [Rollout.from_json(payload) if payload is not None else None for payload in payloads]
