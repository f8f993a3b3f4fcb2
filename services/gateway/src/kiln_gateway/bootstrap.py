"""Builds the real clients from settings and closes them at the end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from kiln_common.bus.connect import connect_async
from kiln_common.clients.datasets import DatasetClient
from kiln_common.clients.engine import EngineClient
from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.clients.trainer import TrainerClient
from kiln_gateway.ports import Clients
from kiln_gateway.settings import GatewaySettings
from kiln_gateway.trainer_pool import TrainerPool

_REDIS_TIMEOUT_S = 1.0


@contextlib.asynccontextmanager
async def open_clients(settings: GatewaySettings) -> AsyncIterator[Clients]:
    """Clients of every service; none has to be up yet."""
    engines: list[EngineClient] = []

    def connect(address: str) -> EngineClient:
        engines.append(EngineClient(address))
        return engines[-1]

    configured = [connect(address) for address in settings.engine_addresses]
    registry = RegistryClient(settings.registry_address)
    trainer = TrainerPool([TrainerClient(address) for address in settings.trainer_addresses])
    datasets = DatasetClient(settings.registry_address)
    evaluations = EvaluationsClient(settings.registry_address)
    store = None
    if settings.redis_url:
        store = connect_async(settings.redis_url, timeout_s=_REDIS_TIMEOUT_S)
    try:
        yield Clients(
            engines=configured,
            registry=registry,
            trainer=trainer,
            datasets=datasets,
            evaluations=evaluations,
            redis=store,
            connect=connect,
        )
    finally:
        for engine in engines:
            await engine.close()
        await registry.close()
        await trainer.close()
        await datasets.close()
        await evaluations.close()
        if store is not None:
            await store.aclose()
