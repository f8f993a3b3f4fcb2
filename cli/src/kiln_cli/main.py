"""The `kiln` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import kiln_cli
from kiln_cli import commands, exit_codes
from kiln_cli.commands import up
from kiln_cli.errors import WrongUsage
from kiln_cli.output import Output
from kiln_cli.session import MACHINE, Json
from kiln_common.errors import KilnError
from kiln_common.variables import unknown_variables

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
    for unknown in unknown_variables():
        typer.echo(f"warning: {unknown}", err=True)


up.register(app)


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

    Exit code 0: it learned, and every request was answered.

    1: it ran to its end, but did not learn or a request failed; the line before the JSON says which.

    2: it could not be carried out. 130: it was interrupted.

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
