"""The registry and the engines, as the worker thread calls them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog

from kiln_common.clients.registry import RegistryClient
from kiln_common.errors import EngineUnavailable, KilnError
from kiln_common.pb import common_pb2, engine_pb2, engine_pb2_grpc, registry_pb2
from kiln_common.rpc import from_rpc_error, open_channel
from kiln_trainer.domain.training import StartingPoint
from kiln_trainer.jobs.ports import LiveReport

log = structlog.get_logger()
T = TypeVar("T")

_RETRY_S = 0.2


class EngineDirectory:
    """The configured engines; used on the event loop."""

    def __init__(self, addresses: Sequence[str], *, info_timeout_s: float, live_timeout_s: float) -> None:
        self._channels = {address: open_channel(address) for address in addresses}
        self._info_timeout_s = info_timeout_s
        self._live_timeout_s = live_timeout_s
        self._boot_ids: dict[str, str] = {}
        self._base_model: common_pb2.BaseModel | None = None
        self._base_model_read_s = -1e9

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def base_model(self, max_age_s: float = 5.0) -> common_pb2.BaseModel | None:
        """What the first engine that answers serves; the last known answer, else None, when none does."""
        if time.monotonic() - self._base_model_read_s < max_age_s:
            return self._base_model
        for address in self._channels:
            try:
                self._base_model = (await self._info(address)).base_model
            except KilnError:
                continue
            self._base_model_read_s = time.monotonic()
            break
        return self._base_model

    async def prepare(self, adapter: common_pb2.AdapterRef) -> tuple[str, ...]:
        """Have every engine load the version; returns those that do not serve it, by boot id.

        An engine that is away is asked again for `live_timeout_s` seconds.
        """
        answers = await asyncio.gather(*(self._prepare_on(address, adapter) for address in self._channels))
        return tuple(name for name in answers if name is not None)

    async def _prepare_on(self, address: str, adapter: common_pb2.AdapterRef) -> str | None:
        deadline_s = time.monotonic() + self._live_timeout_s
        request = engine_pb2.PrepareAdapterRequest(adapter=adapter)
        while True:
            try:
                left_s = max(0.1, deadline_s - time.monotonic())
                stub = engine_pb2_grpc.EngineStub(self._channels[address])  # type: ignore[no-untyped-call]
                await stub.PrepareAdapter(request, timeout=left_s)
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, "engine", EngineUnavailable)
                is_final = error.code != EngineUnavailable.code
                if is_final or time.monotonic() + _RETRY_S > deadline_s:
                    log.warning("adapter_not_live", engine=address, code=error.code, reason=str(error))
                    return self._boot_ids.get(address, address)
                await asyncio.sleep(_RETRY_S)
            else:
                return None

    async def _info(self, address: str) -> engine_pb2.EngineInfo:
        stub = engine_pb2_grpc.EngineStub(self._channels[address])  # type: ignore[no-untyped-call]
        try:
            info = await stub.GetInfo(engine_pb2.GetInfoRequest(), timeout=self._info_timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "engine", EngineUnavailable) from error
        self._boot_ids[address] = info.boot_id
        return info


class GrpcPublisher:
    """A Publisher for a worker thread: its calls run on the event loop that owns the channels."""

    def __init__(
        self, registry: RegistryClient, engines: EngineDirectory, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._registry = registry
        self._engines = engines
        self._loop = loop

    def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        return self._on_loop(self._registry.resolve(reference))

    def download(self, version: registry_pb2.AdapterVersion, folder: Path) -> StartingPoint:
        content = self._on_loop(self._registry.fetch(version.sha256))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter_model.safetensors"
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        os.replace(partial, path)
        return StartingPoint(f"{version.name}@{version.version}", version.config_json, path)

    def publish(
        self, header: registry_pb2.PublishHeader, safetensors_path: Path
    ) -> registry_pb2.AdapterVersion:
        return self._on_loop(self._registry.publish(header, safetensors_path))

    def make_live(self, version: registry_pb2.AdapterVersion) -> LiveReport:
        began_s = time.monotonic()
        adapter = common_pb2.AdapterRef(name=version.name, version=version.version, sha256=version.sha256)
        not_live = self._on_loop(self._engines.prepare(adapter))
        return LiveReport(not_live, time.monotonic() - began_s)

    def _on_loop(self, call: Coroutine[Any, Any, T]) -> T:
        """Every call has its own deadline, so this always returns."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
