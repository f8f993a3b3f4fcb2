"""The `kiln` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import kiln_cli
from kiln_cli import commands, exit_codes
from kiln_cli.errors import WrongUsage
from kiln_cli.output import Output
from kiln_cli.session import MACHINE, Json
from kiln_common.errors import KilnError


class Quantization(StrEnum):
    NONE = "none"
    FP8 = "fp8"
    INT4 = "int4"


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


@app.command(rich_help_panel=MACHINE)
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
            envvar="KILN_STATE_DIR",
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
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Round the weights at load: fp8, or int4 for four bits. As the checkpoint has them when left out.",
            show_default=False,
        ),
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
    trainers: Annotated[
        int | None,
        typer.Option(
            help="Trainers, each beside one engine. One for each GPU with an engine when left out.",
            min=1,
            show_default=False,
        ),
    ] = None,
    redis_memory_mb: Annotated[
        int,
        typer.Option(
            help="Most memory of the private Redis: the queue, rollouts, stored responses.",
            envvar="KILN_REDIS_MAX_MEMORY_MB",
            min=16,
        ),
    ] = 512,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every log line, not only warnings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run everything on this machine: gateway, engine, trainer, registry and a private Redis.

    With --json, a line for each thing that happens; the one with the event "ready" has the URL.

    Example: [bold]kiln up --model ~/models/Qwen3.5-4B --port 8420[/bold]
    """
    import asyncio
    import dataclasses

    from kiln_cli.up.console import UpConsole
    from kiln_cli.up.gpu_sharing import parse_choice, shared_gpu
    from kiln_cli.up.gpus import assign_gpus, choose_num_trainers
    from kiln_cli.up.json_lines import UpJsonLines
    from kiln_cli.up.options import build_options, reachable_url
    from kiln_cli.up.specs import SharedFate, build_specs, engine_names, trainer_names
    from kiln_cli.up.state_dir import StateDirLock, default_state_dir
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
        gpus = assign_gpus(engines, device)
        options = dataclasses.replace(
            options,
            num_gateways=gateways,
            engine_gpus=gpus,
            num_trainers=choose_num_trainers(trainers, gpus),
            redis_memory_mb=redis_memory_mb,
            quantization=quantization.value if quantization else None,
        )
        url = f"http://{'localhost' if host == '127.0.0.1' else host}:{port}"
        console = (UpJsonLines if as_json else UpConsole)(url, folder / "logs", is_verbose=verbose)
        lock.announce(reachable_url(host, port))
        console.starting("the demo model" if options.is_demo_model else options.model, folder)
        with shared_gpu(choice, device, options.run_dir, folder) as sharing:
            if sharing.note:
                console.note(sharing.note)
            specs = build_specs(dataclasses.replace(options, gpu_env=sharing.env))
            sharers = frozenset({*engine_names(options), *trainer_names(options)})
            fate = SharedFate(sharers, sharing.renew) if sharing.renew else None
            supervisor = Supervisor(specs, folder, console, inherited_fds=[lock.fd], shared_fate=fate)
            code = asyncio.run(supervisor.run_until_signal())
    raise typer.Exit(code)


app.command("serve", help="The same as [bold]kiln up[/bold].", rich_help_panel=MACHINE)(up)


@app.command(rich_help_panel=MACHINE)
def demo(
    seed: Annotated[int, typer.Option(help="Order of prompts and shuffling.")] = 0,
    rounds: Annotated[int, typer.Option(help="Sample, score, train: how often.", min=1)] = 16,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Keep state and logs here. A temporary folder when left out.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a stack of its own, let the demo model learn courtesy from a reward, and measure it.

    Takes a few minutes; the last line is JSON, and with --json the only one on standard output.

    Exit code 0: it learned and every request was answered. 1: it ran to its end, but did not learn or
    a request failed, and the line before the JSON says which. 2: it could not be carried out.
    130: it was interrupted.

    Example: [bold]kiln demo --json[/bold]
    """
    from kiln_cli.demo.learning import LearningPlan
    from kiln_cli.demo.run import demo as run

    raise typer.Exit(run(seed, state_dir, LearningPlan(num_rounds=rounds), as_json=as_json))


@app.command(rich_help_panel=MACHINE)
def version(as_json: Json = False) -> None:
    """Print the version.

    Example: [bold]kiln version --json[/bold]
    """
    Output(as_json).answer(
        {"version": kiln_cli.__version__}, lambda console: console.print(kiln_cli.__version__)
    )


commands.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors of ours become one line with a hint, and exit code 2; with --json, so do options
    that are wrong (a person sees those as typer shows them).

    `arguments` are those of the command line unless given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    # By default typer writes what is wrong with the options itself, for people.
    quietly: dict[str, Any] = {"standalone_mode": False, "prog_name": "kiln"} if as_json else {}
    try:
        sys.exit(app(args=list(arguments), **quietly) or exit_codes.DONE)
    except KilnError as error:
        Output(as_json).error(error.code, str(error), error.hint)
        sys.exit(exit_codes.USAGE)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        shown = f"{context.command_path if context else 'kiln'} --help shows what it takes."
        Output(as_json).error(WrongUsage.code, error.format_message(), shown)
        sys.exit(exit_codes.USAGE)
