"""Dataset RPCs: wire types in, catalogue and blobs, wire types out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import grpc
import structlog

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError
from kiln_common.ids import new_id
from kiln_common.pb import dataset_pb2 as pb
from kiln_common.pb import dataset_pb2_grpc
from kiln_registry.blobs import CHUNK_BYTES, BlobStore, Upload
from kiln_registry.datasets.catalog import DatasetCatalog, DatasetRecord
from kiln_registry.domain import AdapterTooLarge, RegistryStorageFull

log = structlog.get_logger()

_FORMATS = ("chat", "prompt_completion", "mixed", "rollouts")
_MAX_NAME_CHARS = 256


class InvalidDatasetHeader(InvalidRequest):
    """The stream of a dataset does not begin as one does."""

    code = "invalid_dataset_header"
    hint = "A dataset begins with a header that has a known format and at least one row."


class DatasetTooLarge(KilnError):
    """The dataset is larger than the registry takes."""

    code = "dataset_too_large"
    kind = ErrorKind.TOO_LARGE
    hint = "Split it, or raise KILN_REGISTRY_MAX_DATASET_BYTES."


class DatasetServicer(dataset_pb2_grpc.DatasetsServicer):
    """Serves one catalogue. File and database work runs on threads."""

    def __init__(self, catalog: DatasetCatalog, blobs: BlobStore) -> None:
        self._catalog = catalog
        self._blobs = blobs

    async def Put(
        self, request_iterator: AsyncIterator[pb.PutDatasetRequest], context: grpc.aio.ServicerContext
    ) -> pb.Dataset:
        header = await _read_header(request_iterator)
        upload = await asyncio.to_thread(self._blobs.begin_upload)
        try:
            async for request in request_iterator:
                await asyncio.to_thread(_write, upload, request)
            record, is_repeat = await asyncio.to_thread(self._record, header, upload)
        except OSError as error:
            log.error("registry_storage_full", reason=str(error))
            raise RegistryStorageFull(f"the registry's disk did not take the dataset: {error}") from error
        finally:
            await asyncio.to_thread(upload.close)  # it may wait for the disk
        log.info("dataset_kept", dataset=record.id, rows=record.num_rows, num_bytes=record.num_bytes)
        return pb.Dataset(**asdict(record), is_repeat=is_repeat)

    async def Get(self, request: pb.GetDatasetRequest, context: grpc.aio.ServicerContext) -> pb.Dataset:
        return pb.Dataset(**asdict(await asyncio.to_thread(self._catalog.get, request.id)))

    async def List(
        self, request: pb.ListDatasetsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDatasetsResponse:
        owner = request.owner if request.HasField("owner") else None
        records = await asyncio.to_thread(self._catalog.list, owner)
        return pb.ListDatasetsResponse(datasets=[pb.Dataset(**asdict(record)) for record in records])

    async def Fetch(
        self, request: pb.FetchDatasetRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DatasetChunk]:
        record = await asyncio.to_thread(self._catalog.get, request.id)
        # An open file stays readable when a deletion unlinks it meanwhile.
        with self._blobs.open_path(record.sha256).open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield pb.DatasetChunk(chunk=chunk)

    async def Delete(
        self, request: pb.DeleteDatasetRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteDatasetResponse:
        await asyncio.to_thread(self._catalog.delete, request.id)
        await asyncio.to_thread(self._blobs.sweep, self._catalog.named_blobs)
        log.info("dataset_deleted", dataset=request.id)
        return pb.DeleteDatasetResponse()

    def _record(self, header: pb.DatasetHeader, upload: Upload) -> tuple[DatasetRecord, bool]:
        upload.finish(header.sha256)
        with self._blobs.hold(upload) as blob:
            new = DatasetRecord(
                id=new_id("ds"),
                owner=header.owner,
                name=header.name,
                format=header.format,
                num_rows=header.num_rows,
                sha256=blob.sha256,
                num_bytes=blob.num_bytes,
                created_at_s=time.time(),
            )
            record = self._catalog.add(new)
        return record, record.id != new.id


async def _read_header(requests: AsyncIterator[pb.PutDatasetRequest]) -> pb.DatasetHeader:
    async for request in requests:
        header = request.header
        if request.WhichOneof("part") != "header" or header.format not in _FORMATS or header.num_rows < 1:
            break
        if len(header.name) > _MAX_NAME_CHARS:
            raise InvalidDatasetHeader(f"the name has {len(header.name)} characters", param="name")
        return header
    raise InvalidDatasetHeader("the dataset does not begin with a header that is complete")


def _write(upload: Upload, request: pb.PutDatasetRequest) -> None:
    if request.WhichOneof("part") != "chunk":
        raise InvalidDatasetHeader("a second header came among the bytes")
    try:
        upload.write(request.chunk)
    except AdapterTooLarge as error:
        raise DatasetTooLarge(str(error).replace("adapter", "dataset")) from error
