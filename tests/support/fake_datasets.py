"""Datasets in memory."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator
from pathlib import Path

from kiln_common.errors import DatasetNotFound
from kiln_common.pb import dataset_pb2


class FakeDatasets:
    """Keeps what it is given; `chunk_bytes` is how much of it comes at once."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[dataset_pb2.Dataset, bytes]] = {}
        self.chunk_bytes = 1000

    async def put(self, header: dataset_pb2.DatasetHeader, path: Path) -> dataset_pb2.Dataset:
        content = path.read_bytes()
        for known, _ in self.kept.values():
            if (known.owner, known.sha256, known.format) == (header.owner, header.sha256, header.format):
                repeat = dataset_pb2.Dataset(is_repeat=True)
                repeat.MergeFrom(known)
                return repeat
        dataset = dataset_pb2.Dataset(
            id=f"ds_{len(self.kept)}",
            owner=header.owner,
            name=header.name,
            format=header.format,
            num_rows=header.num_rows,
            sha256=header.sha256,
            num_bytes=len(content),
        )
        self.kept[dataset.id] = dataset, content
        return dataset

    async def get(self, dataset_id: str) -> dataset_pb2.Dataset:
        if dataset_id not in self.kept:
            raise DatasetNotFound(f"no dataset {dataset_id!r}")
        return self.kept[dataset_id][0]

    async def list(self, owner: str | None = None) -> builtins.list[dataset_pb2.Dataset]:
        return [dataset for dataset, _ in reversed(self.kept.values()) if owner in (None, dataset.owner)]

    async def fetch(self, dataset_id: str) -> AsyncIterator[bytes]:
        await self.get(dataset_id)
        content = self.kept[dataset_id][1]
        for start in range(0, len(content), self.chunk_bytes):
            yield content[start : start + self.chunk_bytes]

    async def delete(self, dataset_id: str) -> None:
        await self.get(dataset_id)
        del self.kept[dataset_id]
