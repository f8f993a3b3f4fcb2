"""`python -m kiln_common.rpc.healthcheck ADDRESS`: exit 0 when that service is serving."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kiln_common.rpc.channel import open_blocking_channel
from kiln_common.rpc.tls import configure_tls


def is_serving(address: str, timeout_s: float = 3.0) -> bool:
    """Whether the gRPC service at `address` reports SERVING within `timeout_s` seconds."""
    with open_blocking_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=False
            )
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


if __name__ == "__main__":
    configure_tls()
    sys.exit(0 if is_serving(sys.argv[1]) else 1)
