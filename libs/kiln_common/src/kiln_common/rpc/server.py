"""A gRPC server as every Kiln service runs it: errors translated, health reported, clean stop."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kiln_common import tracing
from kiln_common.rpc.channel import MAX_MESSAGE_BYTES
from kiln_common.rpc.errors import ErrorInterceptor
from kiln_common.rpc.keys import KeyCheck
from kiln_common.rpc.tls import server_credentials
from kiln_common.rpc.tracing import ReceiveContext


class RpcServer:
    """Binds, serves and stops; servicers are added to `.grpc` before `start()`.

    With a `key_check` it is for clients from outside, else for services: over TLS those show
    certificates, if any are configured (kiln_common.rpc.tls).

    The standard health service answers NOT_SERVING until `set_serving(True)`.
    """

    def __init__(self, address: str, *, key_check: KeyCheck | None = None) -> None:
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        interceptors += [key_check] if key_check is not None else []
        interceptors += [ReceiveContext()] if tracing.is_on() else []
        self._is_for_services = key_check is None
        self.grpc = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self.address = address
        self.port = 0

    async def start(self) -> None:
        """Bind and serve. Raises RuntimeError when the address is taken."""
        await self.set_serving(False)
        credentials = server_credentials(self.address, asks_for_certificates=self._is_for_services)
        if credentials is None:
            self.port = self.grpc.add_insecure_port(self.address)
        else:
            self.port = self.grpc.add_secure_port(self.address, credentials)
        await self.grpc.start()

    async def set_serving(self, is_serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set("", status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)
