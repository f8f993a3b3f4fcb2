"""What `kiln up` runs: each service's command, environment and readiness probe."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kiln_cli.up import readiness
from kiln_common.bus.private_server import server_command
from kiln_common.service_names import service_name

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
    quantization: str | None = None  # none, fp8 or int4; None leaves it to the engine's settings
    redis_url: str | None = None  # None starts a private server
    redis_memory_mb: int = 512  # of the private server
    # For engine and trainer: how they share a GPU.
    gpu_env: Mapping[str, str] = field(default_factory=dict)
    num_gateways: int = 1
    # The GPU of each engine, as CUDA_VISIBLE_DEVICES names it; "" leaves it to the engine.
    engine_gpus: tuple[str, ...] = ("",)
    # Each shares the GPU and the weights of one engine, the first with the first.
    num_trainers: int = 1


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
    names = ("registry", *engine_names(options), *trainer_names(options))
    address = {name: f"unix:{options.run_dir / name}.sock" for name in names}
    specs = []
    if options.redis_url is None:
        specs.append(_redis(options))
    specs.append(_registry(options, address, redis_url))
    specs += [
        _engine(options, name, gpu, address, redis_url)
        for name, gpu in zip(engine_names(options), options.engine_gpus, strict=True)
    ]
    pairs = zip(trainer_names(options), engine_names(options), options.engine_gpus, strict=False)
    specs += [_trainer(options, name, engine, gpu, address, redis_url) for name, engine, gpu in pairs]
    specs += [
        _gateway(options, name, address, redis_url) for name in _numbered("gateway", options.num_gateways)
    ]
    return specs


def engine_names(options: UpOptions) -> list[str]:
    """engine, engine-2, engine-3 …"""
    return _numbered("engine", len(options.engine_gpus))


def trainer_names(options: UpOptions) -> list[str]:
    """trainer, trainer-2 …; each maps the weights of the engine of its number."""
    return _numbered("trainer", options.num_trainers)


def _numbered(name: str, count: int) -> list[str]:
    return [service_name(name, number) for number in range(count)]


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _redis(options: UpOptions) -> ServiceSpec:
    data_dir = options.state_dir / "redis"
    data_dir.mkdir(exist_ok=True, mode=0o700)
    socket_path = options.run_dir / "redis.sock"
    return ServiceSpec(
        name="redis",
        argv=tuple(server_command(data_dir, socket_path=socket_path, max_memory_mb=options.redis_memory_mb)),
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


def _engine(
    options: UpOptions, name: str, gpu: str, address: Mapping[str, str], redis_url: str
) -> ServiceSpec:
    # Each has a folder of its own for the sockets through which it shares its weights.
    socket_dir = options.run_dir if name == "engine" else options.run_dir / name
    env = {
        "KILN_ENGINE_MODEL_PATH": options.model,
        "KILN_ENGINE_LISTEN": address[name],
        "KILN_ENGINE_SOCKET_DIR": str(socket_dir),
        "KILN_ENGINE_REGISTRY_ADDRESS": address["registry"],
        "KILN_ENGINE_REDIS_URL": redis_url,
    }
    served_model_name = options.served_model_name or (DEMO_MODEL_ID if options.is_demo_model else None)
    if served_model_name:
        env["KILN_ENGINE_SERVED_MODEL_NAME"] = served_model_name
    if options.device:
        env["KILN_ENGINE_DEVICE"] = options.device
    if options.quantization:
        env["KILN_ENGINE_QUANTIZATION"] = options.quantization
    return ServiceSpec(
        name=name,
        argv=_module("kiln_engine"),
        env={**env, **options.gpu_env, **_only_gpu(gpu), **_client_listener(name)},
        probe=lambda: readiness.engine_ready(address[name]),
        stop_timeout_s=45.0,
    )


def _trainer(
    options: UpOptions, name: str, engine: str, gpu: str, address: Mapping[str, str], redis_url: str
) -> ServiceSpec:
    env = {
        "KILN_TRAINER_LISTEN": address[name],
        # One folder for all: a job goes on from its checkpoint whichever of them claims it.
        "KILN_TRAINER_STATE_DIR": str(options.state_dir / "trainer"),
        "KILN_TRAINER_REDIS_URL": redis_url,
        "KILN_TRAINER_REGISTRY_ADDRESS": address["registry"],
        "KILN_TRAINER_ENGINE_ADDRESSES": address[engine],
    }
    return ServiceSpec(
        name=name,
        argv=_module("kiln_trainer"),
        env={**env, **options.gpu_env, **_trainers_gpu(gpu), **_client_listener(name)},
        probe=lambda: readiness.grpc_ready(address[name]),
        stop_timeout_s=30.0,
    )


def _client_listener(name: str) -> dict[str, str]:
    """The address for clients from outside, if there is one, is that of the first of a kind."""
    kind, _, number = name.partition("-")
    return {f"KILN_{kind.upper()}_CLIENT_LISTEN": ""} if number else {}


def _only_gpu(gpu: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}


def _trainers_gpu(gpu: str) -> dict[str, str]:
    """That of its engine, unless it was given one of its own."""
    return {} if os.environ.get("KILN_TRAINER_DEVICE") else _only_gpu(gpu)


def _gateway(options: UpOptions, name: str, address: Mapping[str, str], redis_url: str) -> ServiceSpec:
    socket_path = options.run_dir / f"{name}.sock"
    env = {
        "KILN_GATEWAY_HOST": options.host,
        "KILN_GATEWAY_PORT": str(options.port),
        "KILN_GATEWAY_MODEL_PATH": options.model,
        "KILN_GATEWAY_REUSE_PORT": str(options.num_gateways > 1).lower(),
        "KILN_GATEWAY_SOCKET_PATH": str(socket_path),
        "KILN_GATEWAY_ENGINE_ADDRESSES": ",".join(address[engine] for engine in engine_names(options)),
        "KILN_GATEWAY_REGISTRY_ADDRESS": address["registry"],
        "KILN_GATEWAY_TRAINER_ADDRESSES": ",".join(address[each] for each in trainer_names(options)),
        "KILN_GATEWAY_REDIS_URL": redis_url,
        "KILN_GATEWAY_LOG_DIR": str(options.state_dir / "logs"),
    }
    return ServiceSpec(
        name=name,
        argv=_module("kiln_gateway"),
        env=env,
        probe=lambda: readiness.http_ready("http://localhost/readyz", socket_path),
        stop_timeout_s=20.0,
    )
