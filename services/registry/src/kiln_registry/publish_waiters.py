"""Who waits for a version of certain bytes to be committed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from kiln_common.errors import RegistryUnavailable
from kiln_registry.domain import VersionRecord


class PublishWaiters:
    """Lives on the event loop; knows what this process commits, and nothing of what was there before."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], set[asyncio.Future[VersionRecord]]] = {}
        self._has_ended = False

    @contextlib.contextmanager
    def waiting(self, name: str, sha256: str) -> Iterator[asyncio.Future[VersionRecord]]:
        """The first version of the name with these bytes that is committed while the block runs.

        Raises RegistryUnavailable once `end` was called; so does awaiting what was given before.
        """
        if self._has_ended:
            raise _stopping()
        key, coming = (name, sha256), asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(coming)
        try:
            yield coming
        finally:
            coming.cancel()
            self._waiting[key].discard(coming)
            if not self._waiting[key]:
                del self._waiting[key]

    def tell(self, record: VersionRecord) -> None:
        """A version has been committed."""
        for coming in self._waiting.get((record.name, record.sha256), ()):
            if not coming.done():
                coming.set_result(record)

    def end(self) -> None:
        """Nobody need wait any longer: the registry stops."""
        self._has_ended = True
        for coming in [each for waiting in self._waiting.values() for each in waiting]:
            if not coming.done():
                coming.set_exception(_stopping())


def _stopping() -> RegistryUnavailable:
    return RegistryUnavailable("the registry is stopping")
