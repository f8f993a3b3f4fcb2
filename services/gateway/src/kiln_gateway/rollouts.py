"""Rollouts: what a completion was, token by token, kept for a while so that training can name it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
from redis.exceptions import RedisError

from kiln_common.bus import keys
from kiln_common.errors import QueueUnavailable
from kiln_gateway.bounded_store import BoundedStore

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
    has_rules: bool = False  # a grammar, or a budget that may have ended the thinking

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens could not be drawn at all."""
        is_cut = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return is_cut or self.min_tokens > 0 or self.has_rules

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


class RolloutStore:
    """Rollouts in Redis, each for `ttl_s` seconds and together at most `max_bytes`.

    `redis` is a redis.asyncio client, or None: then nothing is kept and nothing is found.
    """

    def __init__(self, redis: Any, *, ttl_s: int, max_bytes: int) -> None:
        self._redis = redis
        self._store = BoundedStore(
            redis,
            index_key=keys.ROLLOUT_INDEX,
            bytes_key=keys.ROLLOUT_BYTES,
            ttl_s=ttl_s,
            max_bytes=max_bytes,
        )

    async def save(self, rollout: Rollout) -> bool:
        """Keep the rollout; False when it could not be kept (no Redis, or larger than all the room)."""
        return await self._store.save(
            keys.rollout(rollout.completion_id, rollout.index),
            rollout.to_json(),
            match_list=keys.rollout_matches(rollout.match_key) if rollout.match_key else "",
            matches_kept=_MATCHES_KEPT,
        )

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
        payloads = await self._store.read(rollout_keys)
        return [Rollout.from_json(payload) if payload is not None else None for payload in payloads]
