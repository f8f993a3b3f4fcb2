"""The catalogue: which versions exist, which one a name means, and what is still to be announced.

Each method is one transaction. Thread-safe; time comes in as an argument.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from kiln_common.adapter_names import AdapterReference, check_adapter_name
from kiln_common.errors import AdapterNotFound, IdempotencyConflict
from kiln_registry import schema
from kiln_registry.domain import (
    AdapterInUse,
    AdapterRecord,
    BaseModelRecord,
    ModuleShape,
    Publication,
    RegistryEvent,
    StaleClaim,
    UnknownBaseModel,
    VersionDeleted,
    VersionRecord,
)

_DEFAULT_ALIAS = "default"
_MAX_OUTBOX_ROWS = 10_000
_MAX_RACES = 3
T = TypeVar("T")


class Catalog:
    """Owns the database; publishes, deletes and moves aliases together with their outbox rows."""

    def __init__(self, engine: Engine) -> None:
        schema.create_schema(engine)
        self._engine = engine
        self._reader = schema.reader(engine)

    def close(self) -> None:
        self._engine.dispose()

    def register_base_model(self, record: BaseModelRecord) -> None:
        """Remember a base model; the same hash again replaces its id and table."""
        modules = {path: [shape.in_features, shape.out_features] for path, shape in record.modules.items()}
        fields = {
            "model_id": record.model_id,
            "modules_json": json.dumps(modules),
            "max_adapter_rank": record.max_adapter_rank,
        }
        table = schema.base_models

        def register(connection: Connection) -> None:
            changed = connection.execute(
                update(table).where(table.c.model_hash == record.model_hash).values(**fields)
            )
            if not changed.rowcount:
                connection.execute(insert(table).values(model_hash=record.model_hash, **fields))

        self._write(register)

    def get_base_model(self, model_hash: str) -> BaseModelRecord:
        """Raises UnknownBaseModel."""
        table = schema.base_models
        with self._reader.begin() as connection:
            row = connection.execute(select(table).where(table.c.model_hash == model_hash)).mappings().first()
        if row is None:
            raise UnknownBaseModel(f"no base model with the hash {model_hash[:80]!r} is registered")
        modules = {path: ModuleShape(*sizes) for path, sizes in json.loads(row["modules_json"]).items()}
        return BaseModelRecord(row["model_id"], row["model_hash"], modules, row["max_adapter_rank"])

    def check_name(self, name: str) -> None:
        """Refuse a name nothing can be published under (see check_adapter_name)."""
        with self._reader.begin() as connection:
            model_ids = connection.scalars(select(schema.base_models.c.model_id)).all()
        check_adapter_name(name, reserved=model_ids)

    def find_published(
        self, publish_key: str, name: str, job_id: str, claim_epoch: int
    ) -> VersionRecord | None:
        """What `publish_key` made before; None when it made nothing. Same errors as `publish`."""
        with self._reader.begin() as connection:
            _check_epoch(connection, job_id, claim_epoch)
            return _find_published(connection, publish_key, name)

    def publish(self, publication: Publication, now_s: float) -> VersionRecord:
        """Record the next version of a name, move its aliases, and queue the announcement.

        Idempotent by publish_key.

        Raises:
            StaleClaim: a later claim of the job has published already.
            VersionDeleted: publish_key made a version that was deleted since.
            IdempotencyConflict: publish_key was used for another name.
        """

        def publish(connection: Connection) -> VersionRecord:
            _check_epoch(connection, publication.job_id, publication.claim_epoch)
            _raise_epoch(connection, publication.job_id, publication.claim_epoch)
            made_before = _find_published(connection, publication.publish_key, publication.name)
            if made_before is not None:
                return made_before
            version = _next_version(connection, publication.name)
            _insert_version(connection, publication, version, now_s)
            _move_alias(connection, _latest_alias(publication.name), publication.name, version)
            record = _version(connection, AdapterReference(publication.name, version))
            _announce(connection, "AdapterPublished", _event_data(record), now_s)
            if publication.attach:
                _move_alias(connection, _DEFAULT_ALIAS, publication.name, version)
                _announce(connection, "DefaultChanged", _event_data(record), now_s)
            return record

        return self._write(publish)

    def resolve(self, reference: AdapterReference) -> VersionRecord:
        """The version a reference means now. Raises AdapterNotFound."""
        with self._reader.begin() as connection:
            return _version(connection, reference)

    def get_adapter(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        found = self._list(name)
        if not found:
            raise AdapterNotFound(f"there is no adapter {name[:140]!r}")
        return found[0]

    def list_adapters(self) -> list[AdapterRecord]:
        """Every name that has versions, in order."""
        return self._list(None)

    def set_default(self, reference: AdapterReference | None, now_s: float) -> VersionRecord | None:
        """Attach a version, or nothing. Raises AdapterNotFound."""

        def change(connection: Connection) -> VersionRecord | None:
            if reference is None:
                table = schema.aliases
                removed = connection.execute(delete(table).where(table.c.alias == _DEFAULT_ALIAS))
                if removed.rowcount:
                    _announce(connection, "DefaultChanged", {}, now_s)
                return None
            record = _version(connection, reference, lock=True)
            if _alias(connection, _DEFAULT_ALIAS) != (record.name, record.version):
                _move_alias(connection, _DEFAULT_ALIAS, record.name, record.version)
                _announce(connection, "DefaultChanged", _event_data(record), now_s)
            return record

        return self._write(change)

    def get_default(self) -> VersionRecord | None:
        with self._reader.begin() as connection:
            attached = _alias(connection, _DEFAULT_ALIAS)
            return None if attached is None else _version(connection, AdapterReference(*attached))

    def delete(self, reference: AdapterReference, now_s: float) -> int:
        """Delete one version, or every version of a bare name; returns how many.

        Raises:
            AdapterNotFound: there is none.
            AdapterInUse: one of them is attached; nothing was deleted.
        """
        with self._engine.begin() as connection:
            # A publish raises last_version in this row: the versions that are left stay the ones read.
            name_row = select(schema.adapters).where(schema.adapters.c.name == reference.name)
            connection.execute(name_row.with_for_update())
            # Locked before the alias is read; set_default locks the same rows, so that a version
            # cannot be attached and deleted at once.
            records = _live_versions(connection, reference.name, lock=True)
            doomed = [r for r in records if reference.version in (None, r.version)]
            if not doomed:
                raise AdapterNotFound(f"there is no adapter {str(reference)[:160]!r}")
            attached = _alias(connection, _DEFAULT_ALIAS)
            for record in doomed:
                if attached == (record.name, record.version):
                    raise AdapterInUse(f"{record.name}@{record.version} is attached as the default")
            for record in doomed:
                _mark_deleted(connection, record, now_s)
                _announce(connection, "AdapterDeleted", _event_data(record), now_s)
            left = [r.version for r in records if r not in doomed]
            _repair_latest(connection, reference.name, left)
            return len(doomed)

    def list_named_blobs(self) -> set[str]:
        """Hashes of the bytes that live versions need."""
        table = schema.versions
        with self._reader.begin() as connection:
            return {*connection.scalars(select(table.c.sha256).where(table.c.deleted_at_s.is_(None)))}

    def read_outbox(self, limit: int) -> list[RegistryEvent]:
        """The oldest facts not announced yet."""
        table = schema.outbox
        with self._reader.begin() as connection:
            rows = connection.execute(select(table).order_by(table.c.id).limit(limit)).mappings()
            return [RegistryEvent(**row) for row in rows]

    def clear_outbox(self, event_id: int) -> None:
        """Forget one fact: Redis has it.

        Not those before it as well: on PostgreSQL a transaction with a lower id may commit later.
        """
        with self._engine.begin() as connection:
            connection.execute(delete(schema.outbox).where(schema.outbox.c.id == event_id))

    def trim_outbox(self) -> None:
        """Bound what waits for a Redis that never comes; readers re-read the truth anyway."""
        table = schema.outbox
        with self._engine.begin() as connection:
            newest = connection.scalar(select(func.max(table.c.id)))
            if newest is not None:
                connection.execute(delete(table).where(table.c.id <= newest - _MAX_OUTBOX_ROWS))

    def _write(self, change: Callable[[Connection], T]) -> T:
        """Carry out a transaction; again where, on PostgreSQL, another one inserted the same first row."""
        for _ in range(_MAX_RACES):
            try:
                with self._engine.begin() as connection:
                    return change(connection)
            except IntegrityError:
                continue  # its row is there now
        with self._engine.begin() as connection:
            return change(connection)

    def _list(self, name: str | None) -> list[AdapterRecord]:
        with self._reader.begin() as connection:
            records = _live_versions(connection, name)
            latest = {row.alias: row.version for row in connection.execute(select(schema.aliases)).all()}
            attached = _alias(connection, _DEFAULT_ALIAS)
        by_name: dict[str, list[VersionRecord]] = {}
        for record in records:
            by_name.setdefault(record.name, []).append(record)
        return [
            AdapterRecord(
                name=name,
                versions=tuple(found),
                latest_version=latest[_latest_alias(name)],
                attached_version=attached[1] if attached and attached[0] == name else 0,
            )
            for name, found in by_name.items()
        ]


def _latest_alias(name: str) -> str:
    return f"latest:{name}"


def _event_data(record: VersionRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "version": record.version,
        "sha256": record.sha256,
        "base_model_hash": record.base_model_hash,
        "job_id": record.job_id,
    }


def _announce(connection: Connection, type_: str, data: dict[str, Any], now_s: float) -> None:
    connection.execute(insert(schema.outbox).values(type=type_, data_json=json.dumps(data), at_s=now_s))


def _check_epoch(connection: Connection, job_id: str, claim_epoch: int) -> None:
    table = schema.job_claims
    seen = connection.scalar(select(table.c.claim_epoch).where(table.c.job_id == job_id)) if job_id else None
    if seen is not None and claim_epoch < seen:
        raise StaleClaim(f"claim {claim_epoch} of job {job_id} is older than claim {seen}")


def _raise_epoch(connection: Connection, job_id: str, claim_epoch: int) -> None:
    if not job_id:
        return
    table = schema.job_claims
    # A later claim may have come since the check: then the insert fails, and the check is made again.
    is_not_later = (table.c.job_id == job_id) & (table.c.claim_epoch <= claim_epoch)
    raised = connection.execute(update(table).where(is_not_later).values(claim_epoch=claim_epoch))
    if not raised.rowcount:
        connection.execute(insert(table).values(job_id=job_id, claim_epoch=claim_epoch))


def _find_published(connection: Connection, publish_key: str, name: str) -> VersionRecord | None:
    if not publish_key:
        return None
    table = schema.versions
    row = connection.execute(select(table).where(table.c.publish_key == publish_key)).mappings().first()
    if row is None:
        return None
    if row["name"] != name:
        raise IdempotencyConflict(f"publish key {publish_key[:140]!r} made a version of {row['name']!r}")
    if row["deleted_at_s"] is not None:
        raise VersionDeleted(f"publish key {publish_key[:140]!r} made {name}@{row['version']}, now deleted")
    return _record(row)


def _next_version(connection: Connection, name: str) -> int:
    table = schema.adapters
    where = table.c.name == name
    raised = connection.execute(update(table).where(where).values(last_version=table.c.last_version + 1))
    if raised.rowcount:
        return connection.execute(select(table.c.last_version).where(where)).scalar_one()
    connection.execute(insert(table).values(name=name, last_version=1))
    return 1


def _insert_version(connection: Connection, publication: Publication, version: int, now_s: float) -> None:
    fields = asdict(publication)
    blob, inspected = fields.pop("blob"), fields.pop("inspected")
    del fields["claim_epoch"], fields["attach"]
    fields["publish_key"] = fields["publish_key"] or None
    inspected["targets"] = ",".join(inspected["targets"])
    connection.execute(
        insert(schema.versions).values(**fields, **blob, **inspected, version=version, created_at_s=now_s)
    )


def _move_alias(connection: Connection, alias: str, name: str, version: int) -> None:
    table = schema.aliases
    moved = connection.execute(update(table).where(table.c.alias == alias).values(name=name, version=version))
    if not moved.rowcount:
        connection.execute(insert(table).values(alias=alias, name=name, version=version))


def _alias(connection: Connection, alias: str) -> tuple[str, int] | None:
    table = schema.aliases
    row = connection.execute(select(table.c.name, table.c.version).where(table.c.alias == alias)).first()
    return None if row is None else (row.name, row.version)


def _version(connection: Connection, reference: AdapterReference, *, lock: bool = False) -> VersionRecord:
    name, version = reference.name, reference.version
    if version is None:
        latest = _alias(connection, _latest_alias(name))
        version = latest[1] if latest else 0
    table = schema.versions
    query = select(table).where(
        table.c.name == name, table.c.version == version, table.c.deleted_at_s.is_(None)
    )
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise AdapterNotFound(f"there is no adapter {str(reference)[:160]!r}")
    return _record(row)


def _live_versions(connection: Connection, name: str | None, *, lock: bool = False) -> list[VersionRecord]:
    table = schema.versions
    query = select(table).where(table.c.deleted_at_s.is_(None)).order_by(table.c.name, table.c.version)
    if name is not None:
        query = query.where(table.c.name == name)
    rows = connection.execute(query.with_for_update() if lock else query).mappings()
    return [_record(row) for row in rows]


def _mark_deleted(connection: Connection, record: VersionRecord, now_s: float) -> None:
    table = schema.versions
    connection.execute(
        update(table)
        .where(table.c.name == record.name, table.c.version == record.version)
        .values(deleted_at_s=now_s)
    )


def _repair_latest(connection: Connection, name: str, versions_left: list[int]) -> None:
    """Point the bare name at the newest version left when the one it meant is gone."""
    table = schema.aliases
    alias = _latest_alias(name)
    if not versions_left:
        connection.execute(delete(table).where(table.c.alias == alias))
        return
    current = _alias(connection, alias)
    if current is None or current[1] not in versions_left:
        _move_alias(connection, alias, name, max(versions_left))


def _record(row: RowMapping) -> VersionRecord:
    fields = {name: row[name] for name in VersionRecord.__slots__}
    fields["targets"] = tuple(fields["targets"].split(","))
    return VersionRecord(**fields)
