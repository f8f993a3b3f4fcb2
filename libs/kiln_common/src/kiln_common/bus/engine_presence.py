"""Engines say on Redis where they are and what they hold; gateways and trainers find them there.

An engine's word is a key with a lease: it is gone a few seconds after the engine has fallen silent,
by the Redis server's own clock. A reader that does not find a word knows nothing: the engine may be
dead, or the key may have made room in a full Redis. Whether an engine lives is asked of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kiln_common.bus import keys
from kiln_common.prefix_path import NAME_BYTES

# A word is renewed this often, and forgotten after so long.
RENEW_S = 1.0
LEASE_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineWord:
    """What an engine says of itself at one moment."""

    address: str  # gRPC, as others reach it
    boot_id: str
    model_hash: str
    page_tokens: int
    num_running: int
    num_waiting: int
    is_draining: bool = False
    # Content hashes of the adapter versions on the device.
    adapters: frozenset[str] = frozenset()
    # Names (kiln_common.prefix_path) of the beginnings it can start from: its state checkpoints.
    prefixes: frozenset[bytes] = frozenset()

    def to_json(self) -> str:
        fields = {
            **asdict(self),
            "adapters": sorted(self.adapters),
            "prefixes": b"".join(self.prefixes).hex(),
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: bytes | str) -> EngineWord:
        """Raises ValueError, KeyError or TypeError when it is no engine's word."""
        fields: dict[str, Any] = json.loads(text)
        names = bytes.fromhex(fields.pop("prefixes"))
        prefixes = frozenset(names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES))
        return cls(**{**fields, "adapters": frozenset(fields["adapters"])}, prefixes=prefixes)


async def say(redis: Any, word: EngineWord) -> None:
    """Give or renew an engine's word. Raises what redis-py raises."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.set(keys.engine(word.boot_id), word.to_json(), px=int(1000 * LEASE_S))
        pipe.sadd(keys.ENGINES, word.boot_id)
        await pipe.execute()


async def withdraw(redis: Any, boot_id: str) -> None:
    """The engine is going, and says so itself. Raises what redis-py raises."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.delete(keys.engine(boot_id))
        pipe.srem(keys.ENGINES, boot_id)
        await pipe.execute()


async def read_words(redis: Any) -> list[EngineWord]:
    """Every word that stands, in the order of boot ids. Raises what redis-py raises."""
    boot_ids = sorted(await redis.smembers(keys.ENGINES))
    if not boot_ids:
        return []
    texts = await redis.mget([keys.engine(boot_id.decode()) for boot_id in boot_ids])
    gone = [boot_id for boot_id, text in zip(boot_ids, texts, strict=True) if text is None]
    if gone:  # an engine that is alive adds itself again
        await redis.srem(keys.ENGINES, *gone)
    return list(_readable(text for text in texts if text is not None))


def _readable(texts: Iterable[bytes]) -> Iterable[EngineWord]:
    for text in texts:
        try:
            yield EngineWord.from_json(text)
        except (ValueError, KeyError, TypeError):  # of another version of Kiln
            continue
