"""What `kiln up` runs: each service's command, environment and readiness probe."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kiln_cli.up import readiness
from kiln_common.bus.private_server import server_command

DEMO_MODEL_ID = "kiln-demo"


@dataclass(frozen=True)
class UpOptions:
    """What the user chose; folders are absolute."""

    model: str  # checkpoint folder, or hub id
    is_demo_model: bool
    host: str
    port: int
    state_dir: Path
    run_dir: Path  # Unix sockets; short enough for their 107-byte paths
    served_model_name: str | None = None
    device: str | None = None
    redis_url: str | None = None  # None starts a private server
    # For engine and trainer: how they share a GPU.
    gpu_env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedFate:
    """Services that a fault of the device takes down together, whichever of them caused it.

    `renew` is called, on a thread, once all have ended and before they start again.
    """

    names: frozenset[str]
    renew: Callable[[], None]


@dataclass(frozen=True)
class ServiceSpec:
    """One process to keep running. `probe` returns a short description once it is ready, else None."""

    name: str
    argv: tuple[str, ...]
    probe: Callable[[], Awaitable[str | None]]
    env: Mapping[str, str] = field(default_factory=dict)
    # Seconds a stop may take before the process is killed.
    stop_timeout_s: float = 15.0


def build_specs(options: UpOptions) -> list[ServiceSpec]:
    """All services, in the order in which they are stopped last to first."""
    redis_url = options.redis_url or f"unix://{options.run_dir / 'redis.sock'}"
    address = {name: f"unix:{options.run_dir / name}.sock" for name in ("registry", "engine", "trainer")}
    specs = []
    if options.redis_url is None:
        specs.append(_redis(options))
    specs.append(_registry(options, address, redis_url))
    specs.append(_engine(options, address, redis_url))
    specs.append(_trainer(options, address, redis_url))
    specs.append(_gateway(options, address, redis_url))
    return specs


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _redis(options: UpOptions) -> ServiceSpec:
    data_dir = options.state_dir / "redis"
    data_dir.mkdir(exist_ok=True, mode=0o700)
    socket_path = options.run_dir / "redis.sock"
    return ServiceSpec(
        name="redis",
        argv=tuple(server_command(data_dir, socket_path=socket_path)),
        probe=lambda: readiness.redis_ready(f"unix://{socket_path}"),
    )


def _registry(options: UpOptions, address: Mapping[str, str], redis_url: str) -> ServiceSpec:
    return ServiceSpec(
        name="registry",
        argv=_module("kiln_registry"),
        env={
            "KILN_REGISTRY_LISTEN": address["registry"],
            "KILN_REGISTRY_STATE_DIR": str(options.state_dir / "registry"),
            "KILN_REGISTRY_REDIS_URL": redis_url,
        },
        probe=lambda: readiness.grpc_ready(address["registry"]),
    )


def _engine(options: UpOptions, address: Mapping[str, str], redis_url: str) -> ServiceSpec:
    env = {
        "KILN_ENGINE_MODEL_PATH": options.model,
        "KILN_ENGINE_LISTEN": address["engine"],
        "KILN_ENGINE_SOCKET_DIR": str(options.run_dir),
        "KILN_ENGINE_REGISTRY_ADDRESS": address["registry"],
        "KILN_ENGINE_REDIS_URL": redis_url,
    }
    served_model_name = options.served_model_name or (DEMO_MODEL_ID if options.is_demo_model else None)
    if served_model_name:
        env["KILN_ENGINE_SERVED_MODEL_NAME"] = served_model_name
    if options.device:
        env["KILN_ENGINE_DEVICE"] = options.device
    return ServiceSpec(
        name="engine",
        argv=_module("kiln_engine"),
        env={**env, **options.gpu_env},
        probe=lambda: readiness.engine_ready(address["engine"]),
        stop_timeout_s=45.0,
    )


def _trainer(options: UpOptions, address: Mapping[str, str], redis_url: str) -> ServiceSpec:
    env = {
        "KILN_TRAINER_LISTEN": address["trainer"],
        "KILN_TRAINER_STATE_DIR": str(options.state_dir / "trainer"),
        "KILN_TRAINER_REDIS_URL": redis_url,
        "KILN_TRAINER_REGISTRY_ADDRESS": address["registry"],
        "KILN_TRAINER_ENGINE_ADDRESSES": address["engine"],
    }
    return ServiceSpec(
        name="trainer",
        argv=_module("kiln_trainer"),
        env={**env, **options.gpu_env},
        probe=lambda: readiness.grpc_ready(address["trainer"]),
        stop_timeout_s=30.0,
    )


def _gateway(options: UpOptions, address: Mapping[str, str], redis_url: str) -> ServiceSpec:
    env = {
        "KILN_GATEWAY_HOST": options.host,
        "KILN_GATEWAY_PORT": str(options.port),
        "KILN_GATEWAY_MODEL_PATH": options.model,
        "KILN_GATEWAY_ENGINE_ADDRESSES": address["engine"],
        "KILN_GATEWAY_REGISTRY_ADDRESS": address["registry"],
        "KILN_GATEWAY_TRAINER_ADDRESS": address["trainer"],
        "KILN_GATEWAY_REDIS_URL": redis_url,
        "KILN_GATEWAY_LOG_DIR": str(options.state_dir / "logs"),
    }
    if options.is_demo_model:
        # The demo model is too small to think before each answer; a request can still ask for it.
        env.setdefault("KILN_GATEWAY_ENABLE_THINKING_DEFAULT", "false")
    return ServiceSpec(
        name="gateway",
        argv=_module("kiln_gateway"),
        env=env,
        probe=lambda: readiness.http_ready(f"http://{_reachable(options.host)}:{options.port}/readyz"),
        stop_timeout_s=20.0,
    )


def _reachable(host: str) -> str:
    """An address, as URLs write it, under which a server on `host` can be reached from here."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
