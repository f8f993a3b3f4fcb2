"""Idempotency-Key: the same key and body give the same resource, another body is a conflict."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import structlog
from fastapi import Request
from redis.exceptions import RedisError

from kiln_common.bus import keys
from kiln_common.errors import IdempotencyConflict, InvalidValue

log = structlog.get_logger()
_TTL_S = 24 * 3600
_KEY = re.compile(r"[\x21-\x7e]{1,128}")


class IdempotencyRecords:
    """Remembers for a day which resource a key made.

    The service that makes the resource is idempotent by the same key; this record also holds where
    the body's meaning changed meanwhile, as when a rollout it names has expired.
    """

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def find(self, request: Request, owner: str, body_sha256: str = "") -> tuple[str, str]:
        """(service key, id of the resource the key made before), each "" when there is none.

        Reads the body, which stays readable, unless its hash is given. Raises IdempotencyConflict,
        InvalidValue.
        """
        key = request.headers.get("idempotency-key", "")
        if not key:
            return "", ""
        if not _KEY.fullmatch(key):
            raise InvalidValue(
                "the Idempotency-Key is not 1 to 128 printable ASCII characters", param="Idempotency-Key"
            )
        service_key = f"{owner}:{request.url.path}:{key}"
        record = await self._read(service_key)
        if record is None:
            return service_key, ""
        digest, _, resource_id = record.partition(" ")
        if digest != (body_sha256 or await _digest(request)):
            raise IdempotencyConflict(f"the Idempotency-Key {key!r} was used with another body")
        return service_key, resource_id

    async def remember(
        self, request: Request, service_key: str, resource_id: str, body_sha256: str = ""
    ) -> None:
        if not service_key or self._redis is None:
            return
        record = f"{body_sha256 or await _digest(request)} {resource_id}"
        try:
            await self._redis.set(keys.gateway_idempotency(service_key), record, ex=_TTL_S)
        except (RedisError, OSError) as error:
            log.warning("idempotency_record_not_kept", error=str(error))

    async def _read(self, service_key: str) -> str | None:
        if self._redis is None:
            return None
        try:
            record = await self._redis.get(keys.gateway_idempotency(service_key))
        except (RedisError, OSError) as error:
            log.warning("idempotency_record_not_read", error=str(error))
            return None
        return record.decode() if record is not None else None


async def _digest(request: Request) -> str:
    return hashlib.sha256(await request.body()).hexdigest()
