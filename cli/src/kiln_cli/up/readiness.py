"""Readiness probes: a short description once a service answers, None until then."""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import redis.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kiln_common.bus.connect import connect_async
from kiln_common.pb import engine_pb2, engine_pb2_grpc

_TIMEOUT_S = 2.0


async def redis_ready(url: str) -> str | None:
    client = connect_async(url, timeout_s=_TIMEOUT_S)
    try:
        await client.ping()
        info = await client.info("server")
    except (redis.exceptions.RedisError, OSError):
        return None
    finally:
        await client.aclose()
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version', info.get('redis_version', ''))}"


async def grpc_ready(address: str) -> str | None:
    async with grpc.aio.insecure_channel(address) as channel:
        return "" if await _is_serving(channel) else None


async def engine_ready(address: str) -> str | None:
    async with grpc.aio.insecure_channel(address) as channel:
        if not await _is_serving(channel):
            return None
        try:
            info = await engine_pb2_grpc.EngineStub(channel).GetInfo(
                engine_pb2.GetInfoRequest(), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return None
    return describe(info)


def describe(info: engine_pb2.EngineInfo) -> str:
    """An engine in one line."""
    parts = [f"{info.base_model.model_id} on {info.device}", info.dtype]
    if info.weights_scheme:
        parts.append(f"{info.weights_scheme} weights")
    if info.speculation:
        parts.append(f"drafts by {info.speculation}")
    return ", ".join([*parts, f"room for {info.num_pages * info.page_tokens:,} tokens"])


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S
        )
    except grpc.aio.AioRpcError:
        return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def http_ready(url: str, socket_path: Path) -> str | None:
    """Asks the server behind that socket, which no other one answers on."""
    transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, transport=transport) as client:
        try:
            response = await client.get(url)
        except httpx.HTTPError:
            return None
    return "" if response.status_code == 200 else None
