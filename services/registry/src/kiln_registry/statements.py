"""The catalogue's statements, each within its caller's transaction."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, delete, insert, select, update

from kiln_common.adapter_names import AdapterReference
from kiln_common.errors import AdapterNotFound, IdempotencyConflict
from kiln_registry import schema
from kiln_registry.domain import AdapterNameTaken, Publication, StaleClaim, VersionDeleted, VersionRecord

DEFAULT_ALIAS = "default"


def latest_alias(name: str) -> str:
    return f"latest:{name}"


def event_data(record: VersionRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "version": record.version,
        "sha256": record.sha256,
        "base_model_hash": record.base_model_hash,
        "job_id": record.job_id,
    }


def announce(connection: Connection, type_: str, data: dict[str, Any], now_s: float) -> None:
    connection.execute(insert(schema.outbox).values(type=type_, data_json=json.dumps(data), at_s=now_s))


def check_epoch(connection: Connection, job_id: str, claim_epoch: int) -> None:
    table = schema.job_claims
    seen = connection.scalar(select(table.c.claim_epoch).where(table.c.job_id == job_id)) if job_id else None
    if seen is not None and claim_epoch < seen:
        raise StaleClaim(f"claim {claim_epoch} of job {job_id} is older than claim {seen}")


def raise_epoch(connection: Connection, job_id: str, claim_epoch: int) -> None:
    if not job_id:
        return
    table = schema.job_claims
    # A later claim may have come since the check: then the insert fails, and the check is made again.
    is_not_later = (table.c.job_id == job_id) & (table.c.claim_epoch <= claim_epoch)
    raised = connection.execute(update(table).where(is_not_later).values(claim_epoch=claim_epoch))
    if not raised.rowcount:
        connection.execute(insert(table).values(job_id=job_id, claim_epoch=claim_epoch))


def find_published(connection: Connection, publish_key: str, name: str) -> VersionRecord | None:
    if not publish_key:
        return None
    query = _select_versions().where(schema.versions.c.publish_key == publish_key)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    if row["name"] != name:
        raise IdempotencyConflict(f"publish key {publish_key[:140]!r} made a version of {row['name']!r}")
    if row["deleted_at_s"] is not None:
        raise VersionDeleted(f"publish key {publish_key[:140]!r} made {name}@{row['version']}, now deleted")
    return to_record(row)


def check_owner(connection: Connection, name: str, owner: str) -> None:
    """Raises AdapterNameTaken where a name with versions belongs to somebody else than `owner`."""
    table = schema.adapters
    found = connection.scalar(select(table.c.owner).where(table.c.name == name))
    if owner and found is not None and found != owner and _has_versions(connection, name):
        raise AdapterNameTaken(name)


def next_version(connection: Connection, name: str, owner: str) -> int:
    """The next number of a name, which belongs to `owner` from now on if it has no versions.

    Raises:
        AdapterNameTaken: it has some, and belongs to somebody else.
    """
    table = schema.adapters
    where = table.c.name == name
    raised = connection.execute(update(table).where(where).values(last_version=table.c.last_version + 1))
    if not raised.rowcount:
        connection.execute(insert(table).values(name=name, last_version=1, owner=owner))
        return 1
    check_owner(connection, name, owner)
    if not _has_versions(connection, name):
        connection.execute(update(table).where(where).values(owner=owner))
    return read_last_version(connection, name)


def _has_versions(connection: Connection, name: str) -> bool:
    table = schema.versions
    query = select(table.c.version).where(table.c.name == name, table.c.deleted_at_s.is_(None)).limit(1)
    return connection.scalar(query) is not None


def audit(
    connection: Connection, actor: str, action: str, name: str, version: int, now_s: float, **detail: Any
) -> None:
    """Add to the log who did what."""
    entry = {"actor": actor, "action": action, "name": name, "version": version, "at_s": now_s}
    connection.execute(insert(schema.audit).values(**entry, detail_json=json.dumps(detail)))


def _select_versions() -> Select[Any]:
    """Versions, each with the owner of its name."""
    return select(schema.versions, schema.adapters.c.owner).join(schema.adapters)


def insert_version(connection: Connection, publication: Publication, version: int, now_s: float) -> None:
    fields = asdict(publication)
    blob, inspected = fields.pop("blob"), fields.pop("inspected")
    del fields["claim_epoch"], fields["attach"], fields["owner"]
    fields["publish_key"] = fields["publish_key"] or None
    inspected["targets"] = ",".join(inspected["targets"])
    connection.execute(
        insert(schema.versions).values(**fields, **blob, **inspected, version=version, created_at_s=now_s)
    )


def move_alias(
    connection: Connection, alias: str, name: str, version: int, *, rolled_back_over: int = 0
) -> None:
    table = schema.aliases
    meaning = {"name": name, "version": version, "rolled_back_over": rolled_back_over}
    moved = connection.execute(update(table).where(table.c.alias == alias).values(meaning))
    if not moved.rowcount:
        connection.execute(insert(table).values(alias=alias, **meaning))


def read_alias(connection: Connection, alias: str) -> tuple[str, int] | None:
    table = schema.aliases
    row = connection.execute(select(table.c.name, table.c.version).where(table.c.alias == alias)).first()
    return None if row is None else (row.name, row.version)


def read_version(connection: Connection, reference: AdapterReference, *, lock: bool = False) -> VersionRecord:
    """The version a reference means now. Raises AdapterNotFound."""
    found = find_version(connection, reference, lock=lock)
    if found is None:
        raise AdapterNotFound(f"there is no adapter {str(reference)[:160]!r}")
    return found


def find_version(
    connection: Connection, reference: AdapterReference, *, lock: bool = False
) -> VersionRecord | None:
    name, version, rolled_back_over = reference.name, reference.version, 0
    if version is None:
        table = schema.aliases
        latest = connection.execute(select(table).where(table.c.alias == latest_alias(name))).first()
        version, rolled_back_over = (latest.version, latest.rolled_back_over) if latest else (0, 0)
    table = schema.versions
    query = _select_versions().where(
        table.c.name == name, table.c.version == version, table.c.deleted_at_s.is_(None)
    )
    row = connection.execute(query.with_for_update(of=table) if lock else query).mappings().first()
    return None if row is None else replace(to_record(row), rolled_back_over=rolled_back_over)


def read_last_version(connection: Connection, name: str) -> int:
    """The highest number that was given out for a name."""
    table = schema.adapters
    return connection.execute(select(table.c.last_version).where(table.c.name == name)).scalar_one()


def read_live_versions(
    connection: Connection, name: str | None, *, lock: bool = False
) -> list[VersionRecord]:
    table = schema.versions
    query = _select_versions().where(table.c.deleted_at_s.is_(None)).order_by(table.c.name, table.c.version)
    if name is not None:
        query = query.where(table.c.name == name)
    rows = connection.execute(query.with_for_update(of=table) if lock else query).mappings()
    return [to_record(row) for row in rows]


def mark_deleted(connection: Connection, record: VersionRecord, now_s: float) -> None:
    table = schema.versions
    connection.execute(
        update(table)
        .where(table.c.name == record.name, table.c.version == record.version)
        .values(deleted_at_s=now_s)
    )


def repair_latest(connection: Connection, name: str, versions_left: list[int]) -> None:
    """Point the bare name at the newest version left when the one it meant is gone."""
    table = schema.aliases
    alias = latest_alias(name)
    if not versions_left:
        connection.execute(delete(table).where(table.c.alias == alias))
        return
    current = read_alias(connection, alias)
    if current is None or current[1] not in versions_left:
        # To engines that still hold the deleted one it is a rollback.
        over = read_last_version(connection, name)
        move_alias(connection, alias, name, max(versions_left), rolled_back_over=over)


def to_record(row: RowMapping) -> VersionRecord:
    fields = {name: row[name] for name in VersionRecord.__slots__ if name in row}
    fields["targets"] = tuple(fields["targets"].split(","))
    return VersionRecord(**fields)
