"""Responses kept in Redis, so that a later request can go on from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson

from kiln_common.bus import keys
from kiln_common.errors import ErrorKind, KilnError
from kiln_gateway.bounded_store import BoundedStore


class ResponseNotFound(KilnError):
    """No response that this key may see is kept under this id any more."""

    code = "response_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = (
        "Responses are kept for KILN_GATEWAY_RESPONSE_TTL_S seconds, for the key that made them, unless "
        'the request said "store": false. Send the conversation itself in `input`.'
    )

    def __init__(self, response_id: str, *, param: str = "") -> None:
        super().__init__(f"there is no response {response_id!r}", param=param)


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response with the conversation it ended, the instructions left out."""

    owner: str
    messages: list[dict[str, Any]]
    response: dict[str, Any]


class ResponseStore:
    """Keeps each response under its id. `redis` is a redis.asyncio client, or None: then nothing is kept."""

    def __init__(self, redis: Any, *, ttl_s: int, max_bytes: int) -> None:
        self._store = BoundedStore(
            redis,
            index_key=keys.RESPONSE_INDEX,
            bytes_key=keys.RESPONSE_BYTES,
            ttl_s=ttl_s,
            max_bytes=max_bytes,
        )

    async def save(self, response_id: str, kept: KeptResponse) -> bool:
        """False when it could not be kept."""
        return await self._store.save(keys.response(response_id), orjson.dumps(asdict(kept)))

    async def find(self, response_id: str, owner: str, *, param: str = "") -> KeptResponse:
        """Raises ResponseNotFound: it is not kept, or not this owner's. QueueUnavailable: no Redis."""
        (payload,) = await self._store.read([keys.response(response_id)])
        kept = KeptResponse(**orjson.loads(payload)) if payload is not None else None
        if kept is None or kept.owner != owner:
            raise ResponseNotFound(response_id, param=param)
        return kept

    async def delete(self, response_id: str, owner: str) -> None:
        """Raises ResponseNotFound, QueueUnavailable."""
        await self.find(response_id, owner)
        await self._store.delete(keys.response(response_id))
