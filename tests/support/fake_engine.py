"""An engine leaf for tests of others: it says what it serves and takes adapters, over real gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from kiln_common.errors import EngineUnavailable
from kiln_common.pb import common_pb2, engine_pb2, engine_pb2_grpc
from kiln_common.rpc import RpcServer
from tests.support.registry import base_model


class AdapterOnlyEngine(engine_pb2_grpc.EngineServicer):
    """Remembers which adapters it was asked to prepare; `refuses` makes it fail."""

    def __init__(self, boot_id: str = "boot_1") -> None:
        self.boot_id = boot_id
        self.base_model: common_pb2.BaseModel = base_model()
        self.prepared: list[str] = []
        self.refuses = False
        self.address = ""
        self.adapter_socket_path = ""

    async def GetInfo(
        self, request: engine_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineInfo:
        return engine_pb2.EngineInfo(
            base_model=self.base_model,
            boot_id=self.boot_id,
            adapter_socket_path=self.adapter_socket_path,
        )

    async def PrepareAdapter(
        self, request: engine_pb2.PrepareAdapterRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.PrepareAdapterResponse:
        if self.refuses:
            raise EngineUnavailable("no slot")
        self.prepared.append(f"{request.adapter.name}@{request.adapter.version}")
        return engine_pb2.PrepareAdapterResponse(slot=1, was_loaded=True)


@contextlib.asynccontextmanager
async def running_engine(boot_id: str = "boot_1") -> AsyncIterator[AdapterOnlyEngine]:
    """Serve one on a loopback port; `engine.address` says where."""
    engine = AdapterOnlyEngine(boot_id)
    server = RpcServer("127.0.0.1:0")
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server.grpc)
    await server.start()
    engine.address = f"127.0.0.1:{server.port}"
    try:
        yield engine
    finally:
        await server.stop(0)
