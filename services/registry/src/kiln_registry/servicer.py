"""Registry RPCs: wire types in, catalogue and blobs, wire types out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict

import grpc
import structlog
from sqlalchemy.exc import OperationalError

from kiln_common.adapter_names import AdapterReference, parse_reference
from kiln_common.errors import AdapterNotFound
from kiln_common.pb import registry_pb2 as pb
from kiln_common.pb import registry_pb2_grpc
from kiln_registry.adapter_file import AdapterFile
from kiln_registry.blobs import CHUNK_BYTES, BlobStore, Upload
from kiln_registry.catalog import Catalog
from kiln_registry.comparison import compare_adapters
from kiln_registry.domain import (
    AdapterRecord,
    BaseModelRecord,
    InvalidBaseModel,
    InvalidPublish,
    ModuleShape,
    RegistryStorageFull,
    VersionRecord,
)
from kiln_registry.inspection import parse_peft_config
from kiln_registry.merger import Merger
from kiln_registry.plain_form import plain_config
from kiln_registry.publish_waiters import PublishWaiters
from kiln_registry.publisher import Publisher

log = structlog.get_logger()

_MAX_METRICS_CHARS = 100_000
_AUDIT_ROWS, _MAX_AUDIT_ROWS = 100, 1000
_SHA256 = re.compile(r"([0-9a-f]{64})?")


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """Serves one catalogue. File and database work runs on threads.

    `on_change` is called on the event loop after each change that has something to announce.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, on_change: Callable[[], None]) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._on_change = on_change
        self._publisher = Publisher(catalog, blobs)
        self._merger = Merger(catalog, blobs, self._publisher)
        self._waiters = PublishWaiters()
        self._arithmetic = asyncio.Semaphore(1)  # one at a time: each takes a core and some memory

    async def RegisterBaseModel(
        self, request: pb.RegisterBaseModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterBaseModelResponse:
        model = request.base_model
        if not model.model_hash or not model.model_id or not model.adaptable_modules:
            raise InvalidBaseModel("a base model needs an id, a hash and its adaptable modules")
        listed = (*model.adaptable_modules, *model.draft_modules)
        modules = {m.path: ModuleShape(m.in_features, m.out_features) for m in listed}
        record = BaseModelRecord(model.model_id, model.model_hash, modules, request.max_adapter_rank)
        if await asyncio.to_thread(self._catalog.register_base_model, record):
            log.info("base_model_registered", model_id=model.model_id, model_hash=model.model_hash)
        return pb.RegisterBaseModelResponse()

    async def Publish(
        self, request_iterator: AsyncIterator[pb.PublishRequest], context: grpc.aio.ServicerContext
    ) -> pb.AdapterVersion:
        header = await _read_header(request_iterator)
        await asyncio.to_thread(self._check_header, header)
        upload = await asyncio.to_thread(self._blobs.begin_upload)
        with _full_disk_named():
            try:
                await _receive(request_iterator, upload)
            except BaseException:
                await asyncio.to_thread(upload.close)  # it may wait for the disk
                raise
            # Once begun it ends: a caller who goes away leaves neither a file nor a version that nobody hears of.
            return _version_pb(await asyncio.shield(self._commit(header, upload)))

    async def AwaitPublish(
        self, request: pb.AwaitPublishRequest, context: grpc.aio.ServicerContext
    ) -> pb.AdapterVersion:
        with self._waiters.waiting(request.name, request.sha256) as coming:
            # It may have been committed before the call came.
            record = await asyncio.to_thread(self._find_latest, request.name, request.sha256)
            return _version_pb(record or await coming)

    def end_waits(self) -> None:
        """Answer those who wait for a publish that the registry is stopping."""
        self._waiters.end()

    async def CheckPublish(
        self, request: pb.CheckPublishRequest, context: grpc.aio.ServicerContext
    ) -> pb.CheckPublishResponse:
        await asyncio.to_thread(self._catalog.check_name, request.name)
        await asyncio.to_thread(self._catalog.check_publish, request.name, request.owner, time.time())
        return pb.CheckPublishResponse()

    async def Hold(self, request: pb.HoldRequest, context: grpc.aio.ServicerContext) -> pb.HoldResponse:
        references = [parse_reference(text) for text in request.references]
        now_s = time.time()
        await asyncio.to_thread(self._catalog.hold, request.holder, references, now_s + request.for_s, now_s)
        return pb.HoldResponse()

    async def ListAudit(
        self, request: pb.ListAuditRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAuditResponse:
        limit = min(request.limit or _AUDIT_ROWS, _MAX_AUDIT_ROWS)
        entries = await asyncio.to_thread(self._catalog.read_audit, request.name, request.before_id, limit)
        return pb.ListAuditResponse(entries=[pb.AuditEntry(**asdict(entry)) for entry in entries])

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
        record = await asyncio.to_thread(
            self._catalog.set_default, reference, time.time(), actor=request.actor
        )
        self._on_change()
        log.info("default_changed", adapter=f"{record.name}@{record.version}" if record else None)
        return pb.SetDefaultResponse(attached=_version_pb(record) if record else None)

    async def GetDefault(
        self, request: pb.GetDefaultRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDefaultResponse:
        record = await asyncio.to_thread(self._catalog.get_default)
        return pb.GetDefaultResponse(attached=_version_pb(record) if record else None)

    async def RollBack(
        self, request: pb.RollBackRequest, context: grpc.aio.ServicerContext
    ) -> pb.RollBackResponse:
        record, has_moved_default = await asyncio.to_thread(
            self._catalog.roll_back,
            AdapterReference(request.name, request.version),
            may_move_default=request.may_move_default,
            now_s=time.time(),
            actor=request.actor,
        )
        self._on_change()
        log.info("adapter_rolled_back", adapter=f"{record.name}@{record.version}", default=has_moved_default)
        return pb.RollBackResponse(version=_version_pb(record), has_moved_default=has_moved_default)

    async def Compare(
        self, request: pb.CompareRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompareResponse:
        later = await asyncio.to_thread(self._catalog.resolve, parse_reference(request.later))
        earlier = None
        if request.earlier:
            earlier = await asyncio.to_thread(self._catalog.resolve, parse_reference(request.earlier))
        async with self._arithmetic:
            modules = await asyncio.to_thread(self._compare, earlier, later)
        answer = pb.CompareResponse(later=_version_pb(later), modules=modules)
        if earlier is not None:
            answer.earlier.CopyFrom(_version_pb(earlier))
        return answer

    async def Merge(self, request: pb.MergeRequest, context: grpc.aio.ServicerContext) -> pb.AdapterVersion:
        async with self._arithmetic:
            with _full_disk_named():
                record = await asyncio.to_thread(self._merger.merge, request)
        self._on_change()
        sources = [f"{source.name}@{source.version}" for source in request.sources]
        log.info(
            "adapter_merged", adapter=f"{record.name}@{record.version}", mode=request.mode, sources=sources
        )
        return _version_pb(record)

    async def DeleteVersion(
        self, request: pb.DeleteVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteVersionResponse:
        reference = AdapterReference(request.name, request.version or None)
        num_deleted = await asyncio.to_thread(
            self._catalog.delete, reference, time.time(), actor=request.actor
        )
        await asyncio.to_thread(self._blobs.sweep, self._catalog.list_named_blobs)
        self._on_change()
        log.info("adapter_deleted", adapter=str(reference), num_deleted=num_deleted)
        return pb.DeleteVersionResponse(num_deleted=num_deleted)

    async def _commit(self, header: pb.PublishHeader, upload: Upload) -> VersionRecord:
        """Record a complete upload, and tell everybody."""
        record = await asyncio.to_thread(self._publish, header, upload)
        self._waiters.tell(record)
        self._on_change()
        log.info(
            "adapter_published", adapter=f"{record.name}@{record.version}", job_id=record.job_id,
            num_bytes=record.num_bytes, sha256=record.sha256,
        )  # fmt: skip
        return record

    def _publish(self, header: pb.PublishHeader, upload: Upload) -> VersionRecord:
        with upload:
            return self._publisher.publish(header, upload)

    def _find_latest(self, name: str, sha256: str) -> VersionRecord | None:
        """What a name means now, if it is these bytes."""
        try:
            record = self._catalog.resolve(AdapterReference(name, None))
        except AdapterNotFound:
            return None
        return record if record.sha256 == sha256 else None

    def _compare(self, earlier: VersionRecord | None, later: VersionRecord) -> list[pb.ModuleComparison]:
        before = self._open(earlier) if earlier is not None else None
        return [pb.ModuleComparison(**asdict(found)) for found in compare_adapters(before, self._open(later))]

    def _open(self, record: VersionRecord) -> AdapterFile:
        return AdapterFile(self._blobs.open_path(record.sha256), record.alpha / record.rank)

    def _check_header(self, header: pb.PublishHeader) -> None:
        """Refuse what can be refused before the bytes arrive."""
        self._catalog.check_name(header.name)
        self._catalog.get_base_model(header.base_model_hash)
        parse_peft_config(plain_config(header.config_json))
        if len(header.metrics_json) > _MAX_METRICS_CHARS or not _is_json_object(header.metrics_json or "{}"):
            raise InvalidPublish("metrics_json must be a JSON object", param="metrics_json")
        if not _SHA256.fullmatch(header.data_sha256):
            raise InvalidPublish("data_sha256 must be 64 lower-case hex digits", param="data_sha256")


@contextlib.contextmanager
def _full_disk_named() -> Iterator[None]:
    """Raises RegistryStorageFull for what a full disk makes of a write."""
    try:
        yield
    except OSError as error:
        raise _storage_full(error) from error
    except OperationalError as error:
        if "disk" not in str(error.orig):  # what SQLite says of its own file
            raise
        raise _storage_full(error.orig) from error


def _storage_full(error: BaseException | None) -> RegistryStorageFull:
    log.error("registry_storage_full", reason=str(error))
    return RegistryStorageFull(f"the registry's disk did not take the version: {error}")


async def _receive(requests: AsyncIterator[pb.PublishRequest], upload: Upload) -> None:
    """Hash and write each chunk while the next one travels."""
    writing: asyncio.Task[None] | None = None
    try:
        async for request in requests:
            if request.WhichOneof("part") != "chunk":
                raise InvalidPublish("a second header came among the bytes")
            if writing is not None:
                await writing
            writing = asyncio.create_task(asyncio.to_thread(upload.write, request.chunk))
    finally:
        if writing is not None:
            await writing


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
    fields = {name: getattr(record, name) for name in VersionRecord.__slots__ if name != "merge_json"}
    merge = json.loads(record.merge_json or "{}")
    return pb.AdapterVersion(
        **fields,
        merge_mode=merge.get("mode", ""),
        merged_from=[pb.MergeSource(**source) for source in merge.get("sources", ())],
    )


def _adapter_pb(record: AdapterRecord) -> pb.Adapter:
    return pb.Adapter(
        name=record.name,
        versions=[_version_pb(version) for version in record.versions],
        latest_version=record.latest_version,
        attached_version=record.attached_version,
        owner=record.owner,
    )
