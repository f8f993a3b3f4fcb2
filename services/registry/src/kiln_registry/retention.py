"""Which versions may go, and how many there may be. Within the caller's transaction."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable

from sqlalchemy import Connection, func, select

from kiln_registry import schema
from kiln_registry import statements as sql
from kiln_registry.domain import AdapterQuotaExceeded, Retention, VersionRecord

_MAX_REMEMBERED = 10_000


class RecentUses:
    """When each version was last looked up, as far as this process knows; thread-safe.

    Before it has run for `grace_s` seconds it knows nothing, and every version counts as used.
    """

    def __init__(self, clock: Callable[[], float], grace_s: float) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self._started_s = clock()
        self._lock = threading.Lock()
        self._used_s: dict[tuple[str, int], float] = {}

    def note(self, record: VersionRecord) -> None:
        now_s = self._clock()
        with self._lock:
            self._used_s[record.name, record.version] = now_s
            if len(self._used_s) > _MAX_REMEMBERED:
                is_recent = now_s - self._grace_s
                self._used_s = {key: at_s for key, at_s in self._used_s.items() if at_s >= is_recent}

    def is_recent(self, record: VersionRecord) -> bool:
        with self._lock:
            used_s = self._used_s.get((record.name, record.version), self._started_s)
        return self._clock() - used_s < self._grace_s


def find_collectable(
    connection: Connection,
    name: str,
    retention: Retention,
    uses: RecentUses,
    now_s: float,
    *,
    num_more: int = 0,
) -> list[VersionRecord]:
    """Versions of a name beyond the newest `keep_versions` that nothing needs.

    Needed are: what an alias means (the default, the bare name), what is held by an engine or a job,
    what was looked up just now, and the parents and merge sources of every version that stays. With
    `num_more`, those that could go once the name has so many more.
    """
    if not retention.keep_versions:
        return []
    # Locked before the aliases are read, as everything that moves one locks them.
    own = sql.read_live_versions(connection, name, lock=True)
    num_candidates = len(own) + num_more - retention.keep_versions
    if num_candidates <= 0:
        return []
    aliases = select(schema.aliases)
    if num_more:  # the bare name will mean the newest of them
        aliases = aliases.where(schema.aliases.c.alias != sql.latest_alias(name))
    needed = {(row.name, row.version) for row in connection.execute(aliases)}
    held = select(schema.holds).where(schema.holds.c.until_s > now_s)
    needed |= {(row.name, row.version) for row in connection.execute(held)}
    num_children = Counter(
        parent for record in sql.read_live_versions(connection, None) for parent in parents_of(record)
    )
    found = []
    # Children are newer than their parents: one that goes does not keep its parent.
    for record in reversed(own[:num_candidates]):
        key = record.name, record.version
        if key in needed or num_children[key] or uses.is_recent(record):
            continue
        found.append(record)
        num_children.subtract(parents_of(record))
    return found


def parents_of(record: VersionRecord) -> list[tuple[str, int]]:
    """Versions that a version was trained from or merged out of."""
    sources = json.loads(record.merge_json or "{}").get("sources", ())
    parents = [(source["name"], source["version"]) for source in sources]
    return parents + ([(record.parent_name, record.parent_version)] if record.parent_version else [])


def check_quota(connection: Connection, name: str, owner: str, retention: Retention, num_more: int) -> None:
    """Raises AdapterQuotaExceeded where a name with `num_more` versions, or its owner, has too much."""
    live = schema.versions.c.deleted_at_s.is_(None)
    if retention.max_versions:
        query = select(func.count()).select_from(schema.versions).where(schema.versions.c.name == name, live)
        num_versions = connection.execute(query).scalar_one() + num_more
        if num_versions > retention.max_versions:
            raise AdapterQuotaExceeded(
                f"{name!r} would have {num_versions} versions, the limit is {retention.max_versions}"
            )
    if retention.max_bytes:
        blobs = select(schema.versions.c.sha256, schema.versions.c.num_bytes).join(schema.adapters)
        distinct = blobs.where(schema.adapters.c.owner == owner, live).distinct().subquery()
        num_bytes = connection.execute(select(func.coalesce(func.sum(distinct.c.num_bytes), 0))).scalar_one()
        if num_bytes > retention.max_bytes:
            raise AdapterQuotaExceeded(
                f"the key's adapters would have {num_bytes} bytes, the limit is {retention.max_bytes}"
            )
