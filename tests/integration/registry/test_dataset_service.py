"""Datasets over gRPC: kept whole or not at all, once for each content, through a restart."""

import errno
import hashlib

import pytest

from kiln_common.clients.datasets import DatasetClient
from kiln_common.errors import KilnError
from kiln_common.pb import dataset_pb2
from kiln_registry.blobs import Upload
from tests.support.registry import running_registry

LINES = b'{"prompt": "a", "completion": "b"}\n' * 40_000  # more than one piece


@pytest.fixture
async def datasets(tmp_path):
    async with running_registry(tmp_path / "state", max_dataset_bytes=2_000_000) as registry:
        client = DatasetClient(registry.address)
        yield client
        await client.close()


def header(content, **fields):
    defaults = {"owner": "me", "name": "n", "format": "chat", "num_rows": 3}
    return dataset_pb2.DatasetHeader(sha256=hashlib.sha256(content).hexdigest(), **{**defaults, **fields})


async def put(client, folder, content, **fields):
    path = folder / "upload"
    path.write_bytes(content)
    return await client.put(header(content, **fields), path)


def files(folder):
    return [path for path in (folder / "state/datasets").rglob("*") if path.is_file()]


async def read(client, dataset_id):
    return b"".join([chunk async for chunk in client.fetch(dataset_id)])


async def test_a_dataset_is_kept_read_and_deleted_with_its_bytes(datasets, tmp_path):
    kept = await put(datasets, tmp_path, LINES)
    assert (kept.num_bytes, kept.num_rows, kept.is_repeat) == (len(LINES), 3, False)
    assert await read(datasets, kept.id) == LINES
    assert await datasets.get(kept.id) == kept
    again = await put(datasets, tmp_path, LINES, name="other")
    assert (again.id, again.is_repeat) == (kept.id, True)
    theirs = await put(datasets, tmp_path, LINES, owner="you")
    assert [each.id for each in await datasets.list()] == [theirs.id, kept.id]
    assert [each.id for each in await datasets.list("me")] == [kept.id]
    assert len(files(tmp_path)) == 1  # one content, whoever keeps it
    await datasets.delete(kept.id)
    assert await read(datasets, theirs.id) == LINES
    await datasets.delete(theirs.id)
    assert files(tmp_path) == []


async def test_what_is_refused_leaves_nothing_behind(datasets, tmp_path):
    for content, fields, code in (
        (b"x" * 2_000_001, {}, "dataset_too_large"),
        (b"abc", {"sha256": "0" * 64}, "sha256_mismatch"),
        (b"abc", {"format": "csv"}, "invalid_dataset_header"),
        (b"abc", {"num_rows": 0}, "invalid_dataset_header"),
    ):
        path = tmp_path / "upload"
        path.write_bytes(content)
        wrong = header(content)
        wrong.MergeFrom(dataset_pb2.DatasetHeader(**fields))
        if "num_rows" in fields:
            wrong.num_rows = 0
        with pytest.raises(KilnError) as caught:
            await datasets.put(wrong, path)
        assert caught.value.code == code
    assert (files(tmp_path), await datasets.list()) == ([], [])
    for call in (datasets.get("ds_none"), datasets.delete("ds_none"), read(datasets, "ds_none")):
        with pytest.raises(KilnError) as caught:
            await call
        assert caught.value.code == "dataset_not_found"


async def test_a_full_disk_is_told_and_leaves_nothing_behind(datasets, tmp_path, monkeypatch):
    def no_space(upload, chunk):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Upload, "write", no_space)
    with pytest.raises(KilnError) as caught:
        await put(datasets, tmp_path, LINES)
    assert (caught.value.code, caught.value.kind.http_status) == ("registry_storage_full", 503)
    assert (files(tmp_path), await datasets.list()) == ([], [])


async def test_datasets_survive_a_restart_and_adapters_deletions(tmp_path):
    async with running_registry(tmp_path / "state") as registry:
        client = DatasetClient(registry.address)
        kept = await put(client, tmp_path, LINES)
        await client.close()
    async with running_registry(tmp_path / "state") as registry:
        client = DatasetClient(registry.address)
        assert await client.list() == [kept]
        assert await read(client, kept.id) == LINES
        await client.close()
