"""Webhooks that are still to be sent, in Redis: entered in the transaction that ends their job.

Each is lent to one sender for a while. One that dies is followed by another, so a message may arrive
twice, with the same id; it never stays away for a crash.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis

from kiln_common.bus import keys
from kiln_common.pb import trainer_pb2

# KEYS webhooks. ARGV now_s, lease_s. The one that has been due for longest, lent.
_TAKE = """
local job_id = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1)[1]
if not job_id then return nil end
redis.call('ZADD', KEYS[1], ARGV[1] + ARGV[2], job_id)
return job_id
"""

# KEYS webhooks, job. ARGV job_id, state, due_s or "" when it is over. A job that has expired is not made again.
_SETTLE = """
if ARGV[3] == '' then redis.call('ZREM', KEYS[1], ARGV[1]) else redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1]) end
if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('HSET', KEYS[2], 'webhook_state', ARGV[2]) end
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook that is due."""

    job_id: str
    webhook: trainer_pb2.Webhook
    num_attempts: int  # before this one


class WebhookOutbox:
    """Over one synchronous client. Any method may raise what redis-py raises when the server is away."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        self._take = self._redis.register_script(_TAKE)
        self._settle = self._redis.register_script(_SETTLE)

    def take(self, now_s: float, lease_s: float) -> Delivery | None:
        """The next due webhook, for `lease_s` seconds; None while none is due."""
        found = self._take(keys=[keys.WEBHOOKS], args=[now_s, lease_s])
        if found is None:
            return None
        job_id = found.decode()
        webhook, state = self._redis.hmget(keys.job(job_id), "webhook", "webhook_state")
        if webhook is None:  # the job has expired meanwhile
            self._redis.zrem(keys.WEBHOOKS, job_id)
            return None
        num_attempts = json.loads(state or "{}").get("num_attempts", 0)
        return Delivery(job_id, trainer_pb2.Webhook.FromString(webhook), num_attempts)

    def settle(self, delivery: Delivery, status: str, error: str, due_s: float | None) -> None:
        """Record how an attempt went, and when the next one is due, None for never."""
        state = {"status": status, "num_attempts": delivery.num_attempts + 1, "error": error}
        self._settle(
            keys=[keys.WEBHOOKS, keys.job(delivery.job_id)],
            args=[delivery.job_id, json.dumps(state), "" if due_s is None else due_s],
        )
