"""Asks the configured Redis whether an accepted job is safe in it."""

from __future__ import annotations

from typing import Any

import redis

from kiln_common.errors import QueueNotDurable

_WANTED = {
    "appendonly": ("yes",),
    "appendfsync": ("always",),
    "maxmemory-policy": ("volatile-ttl", "noeviction"),
}


def check_durable(client: redis.Redis) -> None:
    """Refuse a Redis that could lose a job it has acknowledged.

    Raises:
        QueueNotDurable: a setting allows it, or the server does not tell its settings.
    """
    try:
        found: Any = client.config_get(*_WANTED)
    except redis.ResponseError as error:
        raise QueueNotDurable(
            f"Redis does not tell how durable it is: {error}",
            hint="Let this user run CONFIG GET, or start Kiln's own private Redis.",
        ) from error
    found = {_text(name): _text(value) for name, value in found.items()}
    wrong = [
        f"{name} is {found.get(name)!r}" for name, good in _WANTED.items() if found.get(name) not in good
    ]
    if wrong:
        raise QueueNotDurable(f"Redis could lose an accepted job: {', '.join(wrong)}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
