"""Tables of the catalogue, on SQLite or PostgreSQL, and how an engine to either is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from kiln_common.settings import ConfigurationError

SCHEMA_VERSION = 7

_MAX_RACES = 3
_RETRIED_STATES = ("40P01", "40001")  # deadlock_detected, serialization_failure
T = TypeVar("T")

# Execution option of engines whose transactions only read.
READ_ONLY = "kiln_read_only"

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

base_models = Table(
    "base_models",
    metadata,
    Column("model_hash", String(128), primary_key=True),
    Column("model_id", String(512), nullable=False),
    # {"model.layers.0.mlp.gate_proj": [in_features, out_features], ...}
    Column("modules_json", Text, nullable=False),
    # Since schema 2. 0 where the engine did not say.
    Column("max_adapter_rank", Integer, nullable=False, server_default="0"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(128), primary_key=True),
    # Only ever grows, so that a deleted version's number is not given out again.
    Column("last_version", BigInteger, nullable=False),
    # Since schema 7. Who published its first version; "" where nobody was told apart.
    Column("owner", String(128), nullable=False, server_default=""),
)

# A deleted version stays as a row with deleted_at_s set: its publish_key must not publish anew.
versions = Table(
    "versions",
    metadata,
    Column("name", String(128), ForeignKey("adapters.name"), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("alpha", Float, nullable=False),
    Column("targets", Text, nullable=False),  # joined by commas
    Column("parent_name", String(128), nullable=False),
    Column("parent_version", BigInteger, nullable=False),
    Column("job_id", String(128), nullable=False),
    Column("publish_key", String(256), unique=True),  # NULL where none was given
    Column("base_model_hash", String(128), nullable=False),
    Column("metrics_json", Text, nullable=False),
    Column("config_json", Text, nullable=False),
    Column("created_at_s", Float, nullable=False),
    Column("deleted_at_s", Float),
    Column("data_sha256", String(64), nullable=False, server_default=""),  # since schema 4
    # Since schema 5. {"mode", "sources": [{"name", "version", "weight"}]} of a merged version; else "".
    Column("merge_json", Text, nullable=False, server_default=""),
    # Since schema 6. Of the bytes as they were published; "" in rows of before.
    Column("source_sha256", String(64), nullable=False, server_default=""),
)

# Movable names. "default" is the version the base model's id means; "latest:<name>" the one that
# a bare name means.
aliases = Table(
    "aliases",
    metadata,
    Column("alias", String(160), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("version", BigInteger, nullable=False),
    # Since schema 3. Of "latest:<name>" after a rollback, or after what it meant was deleted: the
    # highest version there was; else 0.
    Column("rolled_back_over", BigInteger, nullable=False, server_default="0"),
)

# Highest claim epoch that has published for a job; older ones are refused.
job_claims = Table(
    "job_claims",
    metadata,
    Column("job_id", String(128), primary_key=True),
    Column("claim_epoch", BigInteger, nullable=False),
)

# Facts still to be announced, in order; a row goes once Redis has it.
outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("type", String(64), nullable=False),
    Column("data_json", Text, nullable=False),
    Column("at_s", Float, nullable=False),
    sqlite_autoincrement=True,  # ids are never given out twice: readers may tell repeats by them
)


# What brings a catalogue to a schema from the one before; tables that are new are created anyway.
_MIGRATIONS = {
    2: ("ALTER TABLE base_models ADD COLUMN max_adapter_rank INTEGER NOT NULL DEFAULT 0",),
    3: ("ALTER TABLE aliases ADD COLUMN rolled_back_over BIGINT NOT NULL DEFAULT 0",),
    4: ("ALTER TABLE versions ADD COLUMN data_sha256 VARCHAR(64) NOT NULL DEFAULT ''",),
    5: ("ALTER TABLE versions ADD COLUMN merge_json TEXT NOT NULL DEFAULT ''",),
    6: ("ALTER TABLE versions ADD COLUMN source_sha256 VARCHAR(64) NOT NULL DEFAULT ''",),
    7: ("ALTER TABLE adapters ADD COLUMN owner VARCHAR(128) NOT NULL DEFAULT ''",),
}


# Versions that must not be collected before `until_s`, by who needs them.
holds = Table(
    "holds",
    metadata,
    Column("holder", String(128), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("until_s", Float, nullable=False),
)

# Who did what; rows are only ever added, and the database sees to it.
audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(32), nullable=False),
    Column("name", String(128), nullable=False, index=True),
    Column("version", BigInteger, nullable=False),
    Column("detail_json", Text, nullable=False),
    sqlite_autoincrement=True,
)
_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER audit_no_{0} BEFORE {0} ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    ),
    "postgresql": "CREATE RULE audit_no_{0} AS ON {0} TO audit DO INSTEAD NOTHING",
}
for _dialect, _statement in _APPEND_ONLY.items():
    for _verb in ("UPDATE", "DELETE"):
        _ddl = DDL(_statement.format(_verb)).execute_if(dialect=_dialect)
        event.listen(audit, "after_create", _ddl)


class DatabaseUrlUnusable(ConfigurationError):
    """KILN_REGISTRY_DATABASE_URL is no database's address, or its driver is not installed."""

    code = "database_url_unusable"
    hint = "Write postgresql://user:password@host/database, and install kiln-registry[postgres]."


class CatalogTooNew(ConfigurationError):
    """A later Kiln has written this state folder's catalogue; it is left as it is."""

    code = "catalog_too_new"
    hint = "Run the Kiln version that wrote this catalogue, or a newer one."


def open_engine(database_url: str, state_dir: Path) -> Engine:
    """A SQLAlchemy engine; an empty URL means SQLite in `state_dir`.

    Raises:
        DatabaseUrlUnusable: SQLAlchemy cannot read the URL, or its driver is not installed.
    """
    if not database_url:
        state_dir.mkdir(parents=True, exist_ok=True)
        database_url = f"sqlite:///{state_dir / 'catalog.sqlite3'}"
    # Without a driver's name SQLAlchemy would take psycopg2, which the `postgres` extra does not install.
    database_url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", database_url)
    try:
        engine = create_engine(database_url, pool_pre_ping=True)
    except (ArgumentError, ImportError) as error:
        raise DatabaseUrlUnusable(f"the catalogue's database cannot be opened: {error}") from error
    if engine.dialect.name == "sqlite":
        _tune_sqlite(engine)
    return engine


def reader(engine: Engine) -> Engine:
    """The same database for transactions that only read; each sees one moment of it."""
    options: dict[str, Any] = {READ_ONLY: True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    return engine.execution_options(**options)


def write(engine: Engine, change: Callable[[Connection], T]) -> T:
    """Carry out a transaction; again where, on PostgreSQL, it lost to another one.

    The other one inserted the same first row, or the two waited for each other and this one had to end.
    """
    for _ in range(_MAX_RACES):
        try:
            with engine.begin() as connection:
                return change(connection)
        except DBAPIError as error:
            if not isinstance(error, IntegrityError) and _sqlstate(error) not in _RETRIED_STATES:
                raise
    with engine.begin() as connection:
        return change(connection)


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def create_schema(engine: Engine) -> None:
    """Create what is missing, and bring an older catalogue up to date.

    Raises:
        CatalogTooNew: a later Kiln wrote this catalogue.
    """
    metadata.create_all(engine)
    with engine.begin() as connection:
        found = connection.scalar(select(schema_version.c.version))
        if found is None:
            connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        elif found > SCHEMA_VERSION:
            raise CatalogTooNew(f"the catalogue has schema {found}, this registry knows {SCHEMA_VERSION}")
        elif found < SCHEMA_VERSION:
            for version in range(found + 1, SCHEMA_VERSION + 1):
                for statement in _MIGRATIONS[version]:
                    connection.execute(text(statement))
            connection.execute(update(schema_version).values(version=SCHEMA_VERSION))


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # Transactions are begun below, not by the driver.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        # FULL syncs each commit: an acknowledged publish survives a power cut.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA busy_timeout=10000")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Any) -> None:
        # Writers take the lock first: a transaction that read before it writes cannot then be
        # refused half-way. SQLite has no row locks, so this also does the work of FOR UPDATE.
        is_read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
