"""The whole life of one `kiln up`: check, start, watch, stop."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from kiln_cli.up.console import UpConsole
from kiln_cli.up.gpu_sharing import GpuSharing, parse_choice, shared_gpu
from kiln_cli.up.gpus import assign_gpus, choose_num_trainers
from kiln_cli.up.json_lines import UpJsonLines
from kiln_cli.up.options import build_options, overruled_variables, reachable_url
from kiln_cli.up.specs import SharedFate, UpOptions, build_specs, engine_names, trainer_names
from kiln_cli.up.state_dir import StateDirLock, default_state_dir
from kiln_cli.up.supervisor import Supervisor


@dataclass(frozen=True)
class UpRequest:
    """What was typed, unchecked; None leaves a choice to us."""

    model: str | None
    host: str
    port: int
    state_dir: Path | None
    served_model_name: str | None
    device: str | None
    quantization: str | None
    gpu_sharing: str | None
    num_gateways: int
    num_engines: int
    num_trainers: int | None
    redis_memory_mb: int
    is_verbose: bool
    as_json: bool


def run_up(request: UpRequest) -> int:
    """Run everything until a signal asks to stop; returns the exit code.

    Raises:
        KilnError: what was asked for cannot be; nothing was started.
    """
    # What is started is executed at once: gRPC has nothing to mend in a fork, and would say so on the console.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    choice = parse_choice(request.gpu_sharing)
    folder = (request.state_dir or default_state_dir()).expanduser().resolve()
    with StateDirLock(folder) as lock:
        options = _options(request, folder)
        console = _console(request, folder)
        lock.announce(reachable_url(request.host, request.port))
        console.starting("the demo model" if options.is_demo_model else options.model, folder)
        with shared_gpu(choice, request.device, options.run_dir, folder) as sharing:
            if sharing.note:
                console.note(sharing.note)
            supervisor = _supervisor(options, sharing, console, lock)
            return asyncio.run(supervisor.run_until_signal())


def _options(request: UpRequest, folder: Path) -> UpOptions:
    options = build_options(
        model=request.model,
        host=request.host,
        port=request.port,
        state_dir=folder,
        served_model_name=request.served_model_name,
        device=request.device,
    )
    gpus = assign_gpus(request.num_engines, request.device)
    return dataclasses.replace(
        options,
        num_gateways=request.num_gateways,
        engine_gpus=gpus,
        num_trainers=choose_num_trainers(request.num_trainers, gpus),
        redis_memory_mb=request.redis_memory_mb,
        quantization=request.quantization,
    )


def _console(request: UpRequest, folder: Path) -> UpConsole:
    url = f"http://{'localhost' if request.host == '127.0.0.1' else request.host}:{request.port}"
    kind = UpJsonLines if request.as_json else UpConsole
    return kind(url, folder / "logs", is_verbose=request.is_verbose)


def _supervisor(
    options: UpOptions, sharing: GpuSharing, console: UpConsole, lock: StateDirLock
) -> Supervisor:
    specs = build_specs(dataclasses.replace(options, gpu_env=sharing.env))
    sharers = frozenset({*engine_names(options), *trainer_names(options)})
    for line in overruled_variables(os.environ, specs):
        console.note(line)
    fate = SharedFate(sharers, sharing.renew) if sharing.renew else None
    return Supervisor(specs, options.state_dir, console, inherited_fds=[lock.fd], shared_fate=fate)
