"""The catalogue: which versions exist, which one a name means, and what is still to be announced.

Each method is one transaction. Thread-safe; time comes in as an argument.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from kiln_common.adapter_names import AdapterReference, check_adapter_name
from kiln_common.errors import AdapterNotFound
from kiln_registry import schema
from kiln_registry import statements as sql
from kiln_registry.domain import (
    AdapterInUse,
    AdapterRecord,
    AuditEntry,
    BaseModelRecord,
    DefaultNeedsAdmin,
    ModuleShape,
    Publication,
    RegistryEvent,
    Retention,
    UnknownBaseModel,
    VersionRecord,
)
from kiln_registry.retention import RecentUses, check_quota, find_collectable

_MAX_OUTBOX_ROWS = 10_000
T = TypeVar("T")


class Catalog:
    """Owns the database; publishes, deletes and moves aliases together with their outbox rows."""

    def __init__(
        self,
        engine: Engine,
        retention: Retention | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` tells how long ago a version was looked up."""
        schema.create_schema(engine)
        self.retention = retention or Retention()
        self._uses = RecentUses(clock, self.retention.grace_s)
        self._engine = engine
        self._reader = schema.reader(engine)

    def close(self) -> None:
        self._engine.dispose()

    def register_base_model(self, record: BaseModelRecord) -> bool:
        """Remember a base model; the same hash again replaces its id and table. Whether that was news."""
        modules = {path: [shape.in_features, shape.out_features] for path, shape in record.modules.items()}
        fields = {
            "model_id": record.model_id,
            "modules_json": json.dumps(modules),
            "max_adapter_rank": record.max_adapter_rank,
        }
        table = schema.base_models

        is_it = table.c.model_hash == record.model_hash

        def register(connection: Connection) -> bool:
            known = connection.execute(select(table).where(is_it).with_for_update()).mappings().first()
            if known is None:
                connection.execute(insert(table).values(model_hash=record.model_hash, **fields))
            elif any(known[name] != value for name, value in fields.items()):
                connection.execute(update(table).where(is_it).values(**fields))
            else:  # engines say it again and again
                return False
            return True

        return self._write(register)

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

    def check_publish(self, name: str, owner: str, now_s: float) -> None:
        """Raises AdapterNameTaken, AdapterQuotaExceeded where `owner` could not publish under the name now."""
        with self._engine.begin() as connection:
            sql.check_owner(connection, name, owner)
            collectable = find_collectable(connection, name, self.retention, self._uses, now_s, num_more=1)
            check_quota(connection, name, owner, self.retention, 1 - len(collectable))

    def hold(self, holder: str, references: Sequence[AdapterReference], until_s: float, now_s: float) -> None:
        """Keep versions from being collected; what `holder` held before, and what has run out, is let go."""
        table = schema.holds

        def hold(connection: Connection) -> None:
            connection.execute(delete(table).where((table.c.holder == holder) | (table.c.until_s <= now_s)))
            for name, version in {
                (found.name, found.version)
                for reference in references
                if (found := sql.find_version(connection, reference)) is not None
            }:
                connection.execute(
                    insert(table).values(holder=holder, name=name, version=version, until_s=until_s)
                )

        self._write(hold)

    def find_published(
        self, publish_key: str, name: str, job_id: str, claim_epoch: int
    ) -> VersionRecord | None:
        """What `publish_key` made before; None when it made nothing. Same errors as `publish`."""
        with self._reader.begin() as connection:
            sql.check_epoch(connection, job_id, claim_epoch)
            return sql.find_published(connection, publish_key, name)

    def publish(self, publication: Publication, now_s: float) -> VersionRecord:
        """Record the next version of a name, move its aliases, and queue the announcement.

        Idempotent by publish_key.

        Raises:
            StaleClaim: a later claim of the job has published already.
            VersionDeleted: publish_key made a version that was deleted since.
            IdempotencyConflict: publish_key was used for another name.
            AdapterNameTaken: the name belongs to another owner.
            AdapterQuotaExceeded: the name or its owner would have too much.
        """

        def publish(connection: Connection) -> VersionRecord:
            sql.check_epoch(connection, publication.job_id, publication.claim_epoch)
            sql.raise_epoch(connection, publication.job_id, publication.claim_epoch)
            made_before = sql.find_published(connection, publication.publish_key, publication.name)
            if made_before is not None:
                return made_before
            version = sql.next_version(connection, publication.name, publication.owner)
            sql.insert_version(connection, publication, version, now_s)
            sql.move_alias(connection, sql.latest_alias(publication.name), publication.name, version)
            record = sql.read_version(connection, AdapterReference(publication.name, version))
            sql.announce(connection, "AdapterPublished", sql.event_data(record), now_s)
            action = "merge" if record.merge_json else "publish"
            detail = {"sha256": record.sha256, "job_id": record.job_id, "attach": publication.attach}
            sql.audit(connection, publication.owner, action, record.name, version, now_s, **detail)
            if publication.attach:
                sql.move_alias(connection, sql.DEFAULT_ALIAS, publication.name, version)
                sql.announce(connection, "DefaultChanged", sql.event_data(record), now_s)
            self._collect(connection, publication.name, now_s)
            check_quota(connection, record.name, record.owner, self.retention, 0)
            return record

        return self._write(publish)

    def resolve(self, reference: AdapterReference) -> VersionRecord:
        """The version a reference means now. Raises AdapterNotFound."""
        with self._reader.begin() as connection:
            record = sql.read_version(connection, reference)
        self._uses.note(record)
        return record

    def get_adapter(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        found = self._list(name)
        if not found:
            raise AdapterNotFound(f"there is no adapter {name[:140]!r}")
        return found[0]

    def list_adapters(self) -> list[AdapterRecord]:
        """Every name that has versions, in order."""
        return self._list(None)

    def set_default(
        self, reference: AdapterReference | None, now_s: float, *, actor: str = ""
    ) -> VersionRecord | None:
        """Attach a version, or nothing. Raises AdapterNotFound."""

        def change(connection: Connection) -> VersionRecord | None:
            if reference is None:
                table = schema.aliases
                removed = connection.execute(delete(table).where(table.c.alias == sql.DEFAULT_ALIAS))
                if removed.rowcount:
                    sql.announce(connection, "DefaultChanged", {}, now_s)
                    sql.audit(connection, actor, "detach", "", 0, now_s)
                return None
            record = sql.read_version(connection, reference, lock=True)
            if sql.read_alias(connection, sql.DEFAULT_ALIAS) != (record.name, record.version):
                sql.move_alias(connection, sql.DEFAULT_ALIAS, record.name, record.version)
                sql.announce(connection, "DefaultChanged", sql.event_data(record), now_s)
                sql.audit(connection, actor, "attach", record.name, record.version, now_s)
            return record

        return self._write(change)

    def get_default(self) -> VersionRecord | None:
        with self._reader.begin() as connection:
            attached = sql.read_alias(connection, sql.DEFAULT_ALIAS)
            if attached is None:
                return None
            record = sql.read_version(connection, AdapterReference(*attached))
        self._uses.note(record)
        return record

    def roll_back(
        self, reference: AdapterReference, *, may_move_default: bool, now_s: float, actor: str = ""
    ) -> tuple[VersionRecord, bool]:
        """Let the bare name mean this version again; returns it, and whether the default moved with it.

        The default moves where it is a later version of the name. The next publish counts again.

        Raises:
            AdapterNotFound: there is no such version.
            DefaultNeedsAdmin: the default would move and may not; nothing was changed.
        """

        def change(connection: Connection) -> tuple[VersionRecord, bool]:
            record = sql.read_version(connection, reference, lock=True)
            name, version = record.name, record.version
            attached = sql.read_alias(connection, sql.DEFAULT_ALIAS)
            moves_default = attached is not None and attached[0] == name and attached[1] > version
            if attached is not None and moves_default and not may_move_default:
                raise DefaultNeedsAdmin(f"{name}@{attached[1]}", f"{name}@{version}")
            over = sql.read_last_version(connection, name)
            sql.move_alias(connection, sql.latest_alias(name), name, version, rolled_back_over=over)
            data = {**sql.event_data(record), "rolled_back_over": over}
            sql.announce(connection, "AdapterRolledBack", data, now_s)
            if moves_default:
                sql.move_alias(connection, sql.DEFAULT_ALIAS, name, version)
                sql.announce(connection, "DefaultChanged", sql.event_data(record), now_s)
            sql.audit(connection, actor, "roll_back", name, version, now_s, default_moved=moves_default)
            return replace(record, rolled_back_over=over), moves_default

        return self._write(change)

    def delete(self, reference: AdapterReference, now_s: float, *, actor: str = "") -> int:
        """Delete one version, or every version of a bare name; returns how many.

        Raises:
            AdapterNotFound: there is none.
            AdapterInUse: one of them is attached; nothing was deleted.
        """

        def remove(connection: Connection) -> int:
            # A publish raises last_version in this row: the versions that are left stay the ones read.
            name_row = select(schema.adapters).where(schema.adapters.c.name == reference.name)
            connection.execute(name_row.with_for_update())
            # Locked before the alias is read; set_default locks the same rows, so that a version
            # cannot be attached and deleted at once.
            records = sql.read_live_versions(connection, reference.name, lock=True)
            doomed = [r for r in records if reference.version in (None, r.version)]
            if not doomed:
                raise AdapterNotFound(f"there is no adapter {str(reference)[:160]!r}")
            attached = sql.read_alias(connection, sql.DEFAULT_ALIAS)
            for record in doomed:
                if attached == (record.name, record.version):
                    raise AdapterInUse(f"{record.name}@{record.version} is attached as the default")
            for record in doomed:
                sql.mark_deleted(connection, record, now_s)
                sql.announce(connection, "AdapterDeleted", sql.event_data(record), now_s)
                sql.audit(connection, actor, "delete", record.name, record.version, now_s)
            left = [r.version for r in records if r not in doomed]
            sql.repair_latest(connection, reference.name, left)
            return len(doomed)

        return self._write(remove)

    def has_other_scaling(self, sha256: str, scaling: float) -> bool:
        """Whether a version that was ever recorded has these bytes and applies them more or less strongly."""
        table = schema.versions
        query = select(table.c.alpha, table.c.rank).where(table.c.sha256 == sha256)
        with self._reader.begin() as connection:
            return any(row.alpha / row.rank != scaling for row in connection.execute(query))

    def list_named_blobs(self) -> set[str]:
        """Hashes of the bytes that live versions need."""
        table = schema.versions
        with self._reader.begin() as connection:
            return {*connection.scalars(select(table.c.sha256).where(table.c.deleted_at_s.is_(None)))}

    def read_audit(self, name: str, before_id: int, limit: int) -> list[AuditEntry]:
        """The newest entries before `before_id` (0: of all), about one adapter ("": about any)."""
        table = schema.audit
        query = select(table).order_by(table.c.id.desc()).limit(limit)
        if name:
            query = query.where(table.c.name == name)
        if before_id:
            query = query.where(table.c.id < before_id)
        with self._reader.begin() as connection:
            return [AuditEntry(**row) for row in connection.execute(query).mappings()]

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

    def _collect(self, connection: Connection, name: str, now_s: float) -> None:
        for record in find_collectable(connection, name, self.retention, self._uses, now_s):
            sql.mark_deleted(connection, record, now_s)
            sql.announce(connection, "AdapterDeleted", sql.event_data(record), now_s)
            sql.audit(connection, "retention", "collect", record.name, record.version, now_s)

    def _write(self, change: Callable[[Connection], T]) -> T:
        return schema.write(self._engine, change)

    def _list(self, name: str | None) -> list[AdapterRecord]:
        with self._reader.begin() as connection:
            records = sql.read_live_versions(connection, name)
            latest = {row.alias: row.version for row in connection.execute(select(schema.aliases)).all()}
            attached = sql.read_alias(connection, sql.DEFAULT_ALIAS)
        by_name: dict[str, list[VersionRecord]] = {}
        for record in records:
            by_name.setdefault(record.name, []).append(record)
        return [
            AdapterRecord(
                name=name,
                versions=tuple(found),
                latest_version=latest[sql.latest_alias(name)],
                attached_version=attached[1] if attached and attached[0] == name else 0,
                owner=found[0].owner,
            )
            for name, found in by_name.items()
        ]
