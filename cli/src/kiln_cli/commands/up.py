"""`kiln up`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kiln_cli.session import MACHINE, Json


class DeviceKind(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Quantization(StrEnum):
    NONE = "none"
    FP8 = "fp8"
    INT4 = "int4"


Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub id. The small demo model when left out.", show_default=False),
]
Port = Annotated[int, typer.Option(help="Port of the HTTP API.", min=1, max=65535)]
Host = Annotated[str, typer.Option(help="Address of the HTTP API.")]
StateDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder for adapters, jobs, Redis data and logs. ~/.local/state/kiln when left out.",
        envvar="KILN_STATE_DIR",
        show_default=False,
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        help="The base model's id in the API. The checkpoint's own when left out.", show_default=False
    ),
]
Device = Annotated[
    DeviceKind | None,
    typer.Option(help="auto, cpu or cuda; auto is a GPU when there is one.", show_default="auto"),
]
Rounding = Annotated[
    Quantization | None,
    typer.Option(
        help="Round the weights at load: fp8, or int4 for four bits. As the checkpoint has them when left out.",
        show_default=False,
    ),
]
GpuSharing = Annotated[
    str | None,
    typer.Option(
        help="How engine and trainer share a GPU. mps: at once, a fault ends both; time_slices: in"
        " turns, isolated; auto: mps where it can run.",
        show_default="auto",
    ),
]
Gateways = Annotated[int, typer.Option(help="Gateway processes on the one port.", min=1)]
Engines = Annotated[int, typer.Option(help="Engines: one for each GPU, or on the CPU.", min=1)]
Trainers = Annotated[
    int | None,
    typer.Option(
        help="Trainers, each beside one engine. One for each GPU with an engine when left out.",
        min=1,
        show_default=False,
    ),
]
RedisMemory = Annotated[
    int,
    typer.Option(
        help="Most memory of the private Redis: the queue, rollouts, stored responses.",
        envvar="KILN_REDIS_MAX_MEMORY_MB",
        min=16,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every log line, not only warnings.")]


def up(
    model: Model = None,
    port: Port = 8420,
    host: Host = "127.0.0.1",
    state_dir: StateDir = None,
    served_model_name: ServedModelName = None,
    device: Device = None,
    quantization: Rounding = None,
    gpu_sharing: GpuSharing = None,
    gateways: Gateways = 1,
    engines: Engines = 1,
    trainers: Trainers = None,
    redis_memory_mb: RedisMemory = 512,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run everything on this machine: gateway, engine, trainer, registry and a private Redis.

    With --json, a line for each thing that happens; the one with the event "ready" has the URL.

    Example: [bold]kiln up --model ~/models/Qwen3.5-4B --port 8420[/bold]
    """
    from kiln_cli.up.run import UpRequest, run_up

    request = UpRequest(
        model=model,
        host=host,
        port=port,
        state_dir=state_dir,
        served_model_name=served_model_name,
        device=device.value if device else None,
        quantization=quantization.value if quantization else None,
        gpu_sharing=gpu_sharing,
        num_gateways=gateways,
        num_engines=engines,
        num_trainers=trainers,
        redis_memory_mb=redis_memory_mb,
        is_verbose=verbose,
        as_json=as_json,
    )
    raise typer.Exit(run_up(request))


def register(app: typer.Typer) -> None:
    app.command("up", rich_help_panel=MACHINE)(up)
    app.command("serve", help="The same as [bold]kiln up[/bold].", rich_help_panel=MACHINE)(up)
