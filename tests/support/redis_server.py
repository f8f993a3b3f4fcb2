"""A real private Redis for tests: `with private_redis(tmp_path) as server: server.url`.

`server.kill()` is a SIGKILL, `server.start()` brings it back over the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kiln_common.bus.private_server import PrivateRedis


@contextmanager
def private_redis(folder: Path) -> Iterator[PrivateRedis]:
    """A durable server with its own folder under `folder`; ends with the block."""
    server = PrivateRedis(folder / "redis", max_memory_mb=64)
    try:
        server.start()
        yield server
    finally:
        server.close()
