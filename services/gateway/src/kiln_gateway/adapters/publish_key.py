"""The registry's idempotency key of what a request publishes."""

from __future__ import annotations

import hashlib


def publish_key(kind: str, owner: str, key: str) -> str:
    """Of an Idempotency-Key, apart by owner and by `kind`; "" without one."""
    if not key:
        return ""
    return f"{kind}:" + hashlib.sha256(f"{owner}:{key}".encode()).hexdigest()
