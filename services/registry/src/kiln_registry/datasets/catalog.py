"""Which datasets there are. Each method is one transaction; time comes in as an argument."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    MetaData,
    String,
    Table,
    delete,
    insert,
    select,
)

from kiln_common.errors import DatasetNotFound
from kiln_registry import schema

_metadata = MetaData()

datasets = Table(
    "datasets",
    _metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", String(256), nullable=False),
    Column("format", String(32), nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at_s", Float, nullable=False),
    Index("datasets_by_content", "owner", "sha256", "format", unique=True),
)


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """One file of lines that an owner keeps; its bytes are the blob `sha256`."""

    id: str
    owner: str
    name: str
    format: str
    num_rows: int
    sha256: str
    num_bytes: int
    created_at_s: float


class DatasetCatalog:
    """Owns the table. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        _metadata.create_all(engine)
        self._engine = engine
        self._reader = schema.reader(engine)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, record: DatasetRecord) -> DatasetRecord:
        """Record a dataset, or return the one with which its owner keeps these bytes already."""
        content = (
            (datasets.c.owner == record.owner)
            & (datasets.c.sha256 == record.sha256)
            & (datasets.c.format == record.format)
        )

        def add(connection: Connection) -> DatasetRecord:
            row = connection.execute(select(datasets).where(content)).mappings().first()
            if row is not None:
                return DatasetRecord(**row)
            connection.execute(insert(datasets).values(**asdict(record)))
            return record

        return schema.write(self._engine, add)

    def get(self, dataset_id: str) -> DatasetRecord:
        """Raises DatasetNotFound."""
        with self._reader.begin() as connection:
            found = select(datasets).where(datasets.c.id == dataset_id)
            row = connection.execute(found).mappings().first()
        if row is None:
            raise DatasetNotFound(f"there is no dataset {dataset_id[:80]!r}")
        return DatasetRecord(**row)

    def list(self, owner: str | None) -> list[DatasetRecord]:
        """The newest first, those of one owner or all."""
        wanted = select(datasets).order_by(datasets.c.created_at_s.desc(), datasets.c.id)
        if owner is not None:
            wanted = wanted.where(datasets.c.owner == owner)
        with self._reader.begin() as connection:
            return [DatasetRecord(**row) for row in connection.execute(wanted).mappings()]

    def delete(self, dataset_id: str) -> None:
        """Raises DatasetNotFound."""
        with self._engine.begin() as connection:
            gone = connection.execute(delete(datasets).where(datasets.c.id == dataset_id))
        if not gone.rowcount:
            raise DatasetNotFound(f"there is no dataset {dataset_id[:80]!r}")

    def named_blobs(self) -> set[str]:
        """The hashes of all bytes that a dataset needs."""
        with self._reader.begin() as connection:
            return {*connection.scalars(select(datasets.c.sha256))}
