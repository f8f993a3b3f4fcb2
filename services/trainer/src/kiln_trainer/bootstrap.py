"""Where the trainer's parts meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import redis
import redis.asyncio
import structlog
from grpc_reflection.v1alpha import reflection

from kiln_common.bus.connect import connect, connect_async
from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.ids import new_id
from kiln_common.pb import trainer_pb2, trainer_pb2_grpc
from kiln_common.rpc import RpcServer
from kiln_common.rpc.client_listener import client_server
from kiln_trainer.client_rights import ClientRights
from kiln_trainer.jobs.held_versions import HeldVersions
from kiln_trainer.jobs.ports import JobBackend
from kiln_trainer.jobs.store import JobStore
from kiln_trainer.jobs.worker import Worker
from kiln_trainer.publishing import EngineDirectory, GrpcPublisher
from kiln_trainer.servicer import CLIENT_SCOPES, TrainerServicer
from kiln_trainer.settings import TrainerSettings
from kiln_trainer.teachers import TeacherDirectory
from kiln_trainer.webhooks.outbox import WebhookOutbox
from kiln_trainer.webhooks.sender import WebhookSender

log = structlog.get_logger()

_SERVICE = trainer_pb2.DESCRIPTOR.services_by_name["Trainer"].full_name
_INFO_TIMEOUT_S = 2.0
_WEBHOOK_GRACE_S = 2.0


@dataclass
class RunningTrainer:
    """A trainer that serves and works; stop it once."""

    trainer_id: str
    server: RpcServer
    client_server: RpcServer | None
    worker: Worker
    webhooks: WebhookSender
    engines: EngineDirectory
    teachers: TeacherDirectory
    registry: RegistryClient
    evaluations: EvaluationsClient
    client: redis.Redis
    tail_client: redis.asyncio.Redis
    stop_grace_s: float
    holding: asyncio.Task[None]

    @property
    def port(self) -> int:
        """TCP port it listens on."""
        return self.server.port

    async def stop(self) -> None:
        """Let go of the running job at its next step boundary, and end."""
        await self.server.set_serving(False)
        self.holding.cancel()
        await asyncio.wait({self.holding})
        await asyncio.to_thread(self.worker.stop, self.stop_grace_s)
        await asyncio.to_thread(self.webhooks.stop, _WEBHOOK_GRACE_S)
        await self.server.stop(0.5)
        if self.client_server is not None:
            await self.client_server.stop(0.5)
        await self.registry.close()
        await self.evaluations.close()
        await self.engines.close()
        await self.teachers.close()
        await self.tail_client.aclose()
        self.client.close()


def torch_backend(settings: TrainerSettings) -> JobBackend:
    """The real backend; imports torch.

    Raises:
        TrainerDeviceNotAvailable: the GPU that the settings name is not there.
    """
    from kiln_trainer.torch_backend.from_settings import backend_from_settings

    return backend_from_settings(settings)


async def start_trainer(
    settings: TrainerSettings, make_backend: Callable[[TrainerSettings], JobBackend] = torch_backend
) -> RunningTrainer:
    """Serve, and begin to work on the queue. Redis, registry and engines may come later."""
    trainer_id = new_id("trainer")
    client, tail_client = connect(settings.redis_url), connect_async(settings.redis_url)
    store = JobStore(client, trainer_id, retention_s=settings.retention_s)
    registry = RegistryClient(settings.registry_address)
    evaluations = EvaluationsClient(settings.registry_address)
    engines = EngineDirectory(
        settings.engine_addresses,
        info_timeout_s=_INFO_TIMEOUT_S,
        live_timeout_s=settings.live_timeout_s,
        rollout_timeout_s=settings.rollout_timeout_s,
        patience_s=settings.patience_s,
        redis=tail_client,
    )
    teachers = TeacherDirectory(
        settings.teacher_addresses,
        info_timeout_s=_INFO_TIMEOUT_S,
        rollout_timeout_s=settings.rollout_timeout_s,
        patience_s=settings.patience_s,
        redis=tail_client,
    )
    backend = await asyncio.to_thread(make_backend, settings)
    worker = Worker(
        store,
        backend,
        GrpcPublisher(registry, engines, asyncio.get_running_loop(), evaluations, teachers),
        settings.state_dir / "jobs",
        claim_timeout_s=settings.claim_timeout_s,
        patience_s=settings.patience_s,
    )
    servicer = TrainerServicer(
        trainer_id, client, tail_client, store, worker, backend, engines, teachers,
        ClientRights(store, registry, evaluations),
        max_payload_bytes=settings.max_payload_bytes,
        webhook_networks=settings.webhook_allowed_networks,
    )  # fmt: skip
    webhooks = WebhookSender(
        WebhookOutbox(client),
        store.get,
        allowed=settings.webhook_allowed_networks,
        first_wait_s=settings.webhook_first_wait_s,
    )
    server = RpcServer(settings.listen)
    clients = client_server(settings, CLIENT_SCOPES)
    servers = [each for each in (server, clients) if each is not None]
    for each in servers:
        trainer_pb2_grpc.add_TrainerServicer_to_server(servicer, each.grpc)
        # Clients that are not ours can ask for the contract: grpcurl, or any reflection client.
        reflection.enable_server_reflection((_SERVICE, reflection.SERVICE_NAME), each.grpc)
        await each.start()
    worker.start()
    webhooks.start()
    for each in servers:
        await each.set_serving(True)
    log.info("trainer_ready", listen=settings.listen, port=server.port, trainer_id=trainer_id)
    holding = asyncio.create_task(HeldVersions(store, registry).run())
    return RunningTrainer(
        trainer_id,
        server,
        clients,
        worker,
        webhooks,
        engines,
        teachers,
        registry,
        evaluations,
        client,
        tail_client,
        settings.stop_grace_s,
        holding,
    )
