"""The engine's client when the engine accepts a request and then does nothing more."""

import asyncio

import pytest

from kiln_common.clients.engine import EngineClient
from kiln_common.errors import DeadlineExceeded
from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc import RpcServer


class _HangingEngine(engine_pb2_grpc.EngineServicer):
    def __init__(self) -> None:
        self.was_aborted = asyncio.Event()

    async def Session(self, requests, context):
        async for request in requests:
            if request.abort == "r":
                self.was_aborted.set()
            if request.abort:
                yield engine_pb2.StepOutputs()


async def test_a_request_ends_although_its_engine_hangs(tmp_path):
    engine, server = _HangingEngine(), RpcServer(f"unix:{tmp_path}/e.sock")
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server.grpc)
    await server.start()
    client = EngineClient(server.address, timeout_s=0.1)
    try:
        request = engine_pb2.GenerateRequest(request_id="r", timeout_s=0.1)
        with pytest.raises(DeadlineExceeded):
            async for _ in client.generate(request):
                pass
        await asyncio.wait_for(engine.was_aborted.wait(), 60)
    finally:
        await client.close()
        await server.stop(0)
