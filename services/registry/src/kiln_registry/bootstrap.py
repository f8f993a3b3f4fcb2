"""Where the registry's parts meet."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from kiln_common.pb import dataset_pb2_grpc, evaluations_pb2_grpc, registry_pb2_grpc
from kiln_common.rpc import RpcServer
from kiln_registry.announcer import Announcer
from kiln_registry.blobs import BlobStore
from kiln_registry.catalog import Catalog
from kiln_registry.datasets.catalog import DatasetCatalog
from kiln_registry.datasets.servicer import DatasetServicer
from kiln_registry.domain import Retention
from kiln_registry.evaluations.servicer import EvaluationServicer
from kiln_registry.evaluations.store import EvaluationStore
from kiln_registry.schema import open_engine
from kiln_registry.servicer import RegistryServicer
from kiln_registry.settings import RegistrySettings

log = structlog.get_logger()


@dataclass
class RunningRegistry:
    """A registry that serves; stop it once."""

    server: RpcServer
    adapters: RegistryServicer
    catalog: Catalog
    datasets: DatasetCatalog
    announcer: Announcer | None
    stop_grace_s: float

    @property
    def port(self) -> int:
        """TCP port it listens on."""
        return self.server.port

    async def stop(self) -> None:
        self.adapters.end_waits()  # engines may wait for longer than a stop takes
        await self.server.stop(self.stop_grace_s)
        if self.announcer is not None:
            await self.announcer.stop()
        self.catalog.close()
        self.datasets.close()


async def start_registry(settings: RegistrySettings) -> RunningRegistry:
    """Open the state, clean up after a crash, and serve."""
    retention = Retention(
        keep_versions=settings.keep_versions,
        max_versions=settings.max_versions_per_adapter,
        max_bytes=settings.max_bytes_per_key,
        grace_s=settings.collect_grace_s,
    )
    engine = open_engine(settings.database_url, settings.state_dir)
    catalog = Catalog(engine, retention)
    evaluations = EvaluationServicer(EvaluationStore(engine))
    blobs = BlobStore(settings.state_dir, max_blob_bytes=settings.max_adapter_bytes)
    blobs.remove_abandoned_uploads()
    num_orphans = blobs.sweep(catalog.list_named_blobs)
    catalog.trim_outbox()
    datasets = DatasetCatalog(open_engine(settings.database_url, settings.state_dir))
    dataset_blobs = BlobStore(settings.state_dir / "datasets", max_blob_bytes=settings.max_dataset_bytes)
    dataset_blobs.remove_abandoned_uploads()
    dataset_blobs.sweep(datasets.named_blobs)
    announcer = Announcer(catalog, settings.redis_url) if settings.redis_url else None
    on_change = announcer.wake if announcer else _nothing_to_wake
    server = RpcServer(settings.listen)
    adapters = RegistryServicer(catalog, blobs, on_change)
    registry_pb2_grpc.add_RegistryServicer_to_server(adapters, server.grpc)
    dataset_pb2_grpc.add_DatasetsServicer_to_server(DatasetServicer(datasets, dataset_blobs), server.grpc)
    evaluations_pb2_grpc.add_EvaluationsServicer_to_server(evaluations, server.grpc)
    await server.start()
    await server.set_serving(True)
    if announcer is not None:
        announcer.start()
    log.info("registry_ready", listen=settings.listen, port=server.port, orphans_removed=num_orphans)
    return RunningRegistry(server, adapters, catalog, datasets, announcer, settings.stop_grace_s)


def _nothing_to_wake() -> None:
    """Without a Redis, facts stay in the outbox until the registry is started with one."""
