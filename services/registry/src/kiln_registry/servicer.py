"""Registry RPCs: wire types in, catalogue and blobs, wire types out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from sqlalchemy.exc import OperationalError

from kiln_common.adapter_names import AdapterReference, parse_reference
from kiln_common.pb import registry_pb2 as pb
from kiln_common.pb import registry_pb2_grpc
from kiln_registry.blobs import CHUNK_BYTES, BlobStore, Upload
from kiln_registry.catalog import Catalog
from kiln_registry.domain import (
    AdapterRecord,
    BaseModelRecord,
    InvalidBaseModel,
    InvalidPublish,
    ModuleShape,
    Publication,
    RegistryStorageFull,
    VersionRecord,
)
from kiln_registry.inspection import inspect_adapter, parse_peft_config

log = structlog.get_logger()

_MAX_METRICS_CHARS = 100_000


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """Serves one catalogue. File and database work runs on threads.

    `on_change` is called on the event loop after each change that has something to announce.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, on_change: Callable[[], None]) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._on_change = on_change

    async def RegisterBaseModel(
        self, request: pb.RegisterBaseModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterBaseModelResponse:
        model = request.base_model
        if not model.model_hash or not model.model_id or not model.adaptable_modules:
            raise InvalidBaseModel("a base model needs an id, a hash and its adaptable modules")
        modules = {m.path: ModuleShape(m.in_features, m.out_features) for m in model.adaptable_modules}
        record = BaseModelRecord(model.model_id, model.model_hash, modules, request.max_adapter_rank)
        await asyncio.to_thread(self._catalog.register_base_model, record)
        log.info("base_model_registered", model_id=model.model_id, model_hash=model.model_hash)
        return pb.RegisterBaseModelResponse()

    async def Publish(
        self, request_iterator: AsyncIterator[pb.PublishRequest], context: grpc.aio.ServicerContext
    ) -> pb.AdapterVersion:
        header = await _read_header(request_iterator)
        await asyncio.to_thread(self._check_header, header)
        upload = await asyncio.to_thread(self._blobs.begin_upload)
        try:
            async for request in request_iterator:
                if request.WhichOneof("part") != "chunk":
                    raise InvalidPublish("a second header came among the bytes")
                await asyncio.to_thread(upload.write, request.chunk)
            record = await asyncio.to_thread(self._publish, header, upload)
        except OSError as error:
            raise _storage_full(error) from error
        except OperationalError as error:
            if "disk" not in str(error.orig):  # what SQLite says of its own file
                raise
            raise _storage_full(error.orig) from error
        finally:
            upload.close()
        self._on_change()
        log.info(
            "adapter_published", adapter=f"{record.name}@{record.version}", job_id=record.job_id,
            num_bytes=record.num_bytes, sha256=record.sha256,
        )  # fmt: skip
        return _version_pb(record)

    async def Resolve(
        self, request: pb.ResolveRequest, context: grpc.aio.ServicerContext
    ) -> pb.AdapterVersion:
        reference = parse_reference(request.reference)
        return _version_pb(await asyncio.to_thread(self._catalog.resolve, reference))

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        return _adapter_pb(await asyncio.to_thread(self._catalog.get_adapter, request.name))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        records = await asyncio.to_thread(self._catalog.list_adapters)
        return pb.ListAdaptersResponse(adapters=[_adapter_pb(record) for record in records])

    async def Fetch(
        self, request: pb.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FetchChunk]:
        path = self._blobs.open_path(request.sha256)
        # An open file stays readable when a deletion unlinks it meanwhile.
        with path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield pb.FetchChunk(chunk=chunk)

    async def SetDefault(
        self, request: pb.SetDefaultRequest, context: grpc.aio.ServicerContext
    ) -> pb.SetDefaultResponse:
        reference = parse_reference(request.reference) if request.reference else None
        record = await asyncio.to_thread(self._catalog.set_default, reference, time.time())
        self._on_change()
        log.info("default_changed", adapter=f"{record.name}@{record.version}" if record else None)
        return pb.SetDefaultResponse(attached=_version_pb(record) if record else None)

    async def GetDefault(
        self, request: pb.GetDefaultRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDefaultResponse:
        record = await asyncio.to_thread(self._catalog.get_default)
        return pb.GetDefaultResponse(attached=_version_pb(record) if record else None)

    async def DeleteVersion(
        self, request: pb.DeleteVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteVersionResponse:
        reference = AdapterReference(request.name, request.version or None)
        num_deleted = await asyncio.to_thread(self._catalog.delete, reference, time.time())
        await asyncio.to_thread(self._blobs.sweep, self._catalog.list_named_blobs)
        self._on_change()
        log.info("adapter_deleted", adapter=str(reference), num_deleted=num_deleted)
        return pb.DeleteVersionResponse(num_deleted=num_deleted)

    def _check_header(self, header: pb.PublishHeader) -> None:
        """Refuse what can be refused before the bytes arrive."""
        self._catalog.check_name(header.name)
        self._catalog.get_base_model(header.base_model_hash)
        parse_peft_config(header.config_json)
        if len(header.metrics_json) > _MAX_METRICS_CHARS or not _is_json_object(header.metrics_json or "{}"):
            raise InvalidPublish("metrics_json must be a JSON object", param="metrics_json")

    def _publish(self, header: pb.PublishHeader, upload: Upload) -> VersionRecord:
        upload.finish(header.sha256)
        # A repeat is answered without a second look at its bytes, which need not be the same ones.
        made_before = self._catalog.find_published(
            header.publish_key, header.name, header.job_id, header.claim_epoch
        )
        if made_before is not None:
            return made_before
        base_model = self._catalog.get_base_model(header.base_model_hash)
        inspected = inspect_adapter(upload.path, parse_peft_config(header.config_json), base_model)
        is_recorded = False
        try:
            with self._blobs.hold(upload) as blob:
                publication = Publication(
                    name=header.name, base_model_hash=header.base_model_hash,
                    config_json=header.config_json, blob=blob, inspected=inspected,
                    parent_name=header.parent_name, parent_version=header.parent_version,
                    job_id=header.job_id, publish_key=header.publish_key,
                    claim_epoch=header.claim_epoch, attach=header.attach,
                    metrics_json=header.metrics_json or "{}",
                )  # fmt: skip
                record = self._catalog.publish(publication, time.time())
            is_recorded = True
            return record
        finally:
            if not is_recorded:
                self._blobs.sweep(self._catalog.list_named_blobs)


def _storage_full(error: BaseException | None) -> RegistryStorageFull:
    log.error("registry_storage_full", reason=str(error))
    return RegistryStorageFull(f"the registry's disk did not take the version: {error}")


async def _read_header(requests: AsyncIterator[pb.PublishRequest]) -> pb.PublishHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise InvalidPublish("a publish begins with its header")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _version_pb(record: VersionRecord) -> pb.AdapterVersion:
    return pb.AdapterVersion(**{name: getattr(record, name) for name in VersionRecord.__slots__})


def _adapter_pb(record: AdapterRecord) -> pb.Adapter:
    return pb.Adapter(
        name=record.name,
        versions=[_version_pb(version) for version in record.versions],
        latest_version=record.latest_version,
        attached_version=record.attached_version,
    )
