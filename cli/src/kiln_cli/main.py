"""The `kiln` command."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import kiln_cli
from kiln_common.errors import KilnError

app = typer.Typer(
    name="kiln",
    help="Serve Qwen3.5 through the OpenAI API, and let it learn from rewards while it serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(kiln_cli.__version__)
        raise typer.Exit()


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Serve Qwen3.5 through the OpenAI API, and let it learn from rewards while it serves."""


@app.command()
def up(
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or hub id. The small demo model when left out.", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the HTTP API.", min=1, max=65535)] = 8420,
    host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1",
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for adapters, jobs, Redis data and logs. ~/.local/state/kiln when left out.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="The base model's id in the API. The checkpoint's own when left out.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. A GPU when there is one.", show_default=False)
    ] = None,
    gpu_sharing: Annotated[
        str | None,
        typer.Option(
            help="How engine and trainer share a GPU. mps: at once, a fault ends both; time_slices: in"
            " turns, isolated; auto: mps where it can run.",
            show_default="auto",
        ),
    ] = None,
    gateways: Annotated[int, typer.Option(help="Gateway processes on the one port.", min=1)] = 1,
    engines: Annotated[int, typer.Option(help="Engines: one for each GPU, or on the CPU.", min=1)] = 1,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every log line, not only warnings.")
    ] = False,
) -> None:
    """Run everything on this machine: gateway, engine, trainer, registry and a private Redis.

    Example: [bold]kiln up --model ~/models/Qwen3.5-4B --port 8420[/bold]
    """
    from kiln_cli.up.console import UpConsole
    from kiln_cli.up.gpu_sharing import parse_choice, shared_gpu
    from kiln_cli.up.gpus import assign_gpus
    from kiln_cli.up.options import StateDirLock, build_options, default_state_dir
    from kiln_cli.up.specs import SharedFate, build_specs, engine_names
    from kiln_cli.up.supervisor import Supervisor

    choice = parse_choice(gpu_sharing)
    folder = (state_dir or default_state_dir()).expanduser().resolve()
    with StateDirLock(folder) as lock:
        options = build_options(
            model=model,
            host=host,
            port=port,
            state_dir=folder,
            served_model_name=served_model_name,
            device=device,
        )
        options = dataclasses.replace(
            options, num_gateways=gateways, engine_gpus=assign_gpus(engines, device)
        )
        url = f"http://{'localhost' if host == '127.0.0.1' else host}:{port}"
        console = UpConsole(url, folder / "logs", is_verbose=verbose)
        console.starting("the demo model" if options.is_demo_model else options.model, folder)
        with shared_gpu(choice, device, options.run_dir, folder) as sharing:
            if sharing.note:
                console.note(sharing.note)
            specs = build_specs(dataclasses.replace(options, gpu_env=sharing.env))
            sharers = frozenset({*engine_names(options), "trainer"})
            fate = SharedFate(sharers, sharing.renew) if sharing.renew else None
            supervisor = Supervisor(specs, folder, console, inherited_fds=[lock.fd], shared_fate=fate)
            code = asyncio.run(supervisor.run_until_signal())
    raise typer.Exit(code)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Order of prompts and shuffling.")] = 0,
    rounds: Annotated[int, typer.Option(help="Sample, score, train: how often.", min=1)] = 16,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Keep state and logs here. A temporary folder when left out.", show_default=False),
    ] = None,
) -> None:
    """Start a stack of its own, let the demo model learn courtesy from a reward, and measure it.

    Takes a few minutes; the last line is JSON. Example: [bold]kiln demo | tail -1[/bold]

    Exit code 0: it learned and every request was answered. 1: it ran to its end, but did not learn or
    a request failed, and the line before the JSON says which. 2: it could not be carried out.
    130: it was interrupted.
    """
    from kiln_cli.demo.learning import LearningPlan
    from kiln_cli.demo.run import demo as run

    raise typer.Exit(run(seed, state_dir, LearningPlan(num_rounds=rounds)))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(kiln_cli.__version__)


def main() -> None:
    """Entry point: errors of ours become one line with a hint, and exit code 2."""
    try:
        app()
    except KilnError as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[red]{error.code}[/red]: {escape(str(error))}")
        if error.hint:
            console.print(f"  {escape(error.hint)}", style="dim")
        sys.exit(2)
