"""`kiln logs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from kiln_cli.session import MACHINE, Session, command


def register(app: typer.Typer) -> None:
    examples = ["kiln logs", "kiln logs engine trainer --level info --lines 20 --json"]
    command(app, "logs", examples=examples, asks_server=False, panel=MACHINE)(logs)


def logs(
    session: Session,
    services: Annotated[
        list[str] | None,
        typer.Argument(
            help="gateway, engine, trainer, registry, redis. All when left out.", show_default=False
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many.", min=1)] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], typer.Option(help="At least this.")
    ] = "debug",
    grep: Annotated[
        str,
        typer.Option(help="Lines that contain this, such as a request's or a job's id.", show_default=False),
    ] = "",
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="The folder of kiln up. ~/.local/state/kiln when left out.",
            envvar="KILN_STATE_DIR",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the services' logs together, in the order of their time. With --json, one document a line."""
    from kiln_cli.logs.reader import LogFilter, LogLine, last_lines, log_files
    from kiln_cli.logs.reader import follow as follow_files
    from kiln_cli.up.console import service_line
    from kiln_cli.up.state_dir import default_state_dir

    folder = (state_dir or default_state_dir()).expanduser() / "logs"
    files = log_files(folder, services or ())
    wanted = LogFilter(level, grep)

    def show(line: LogLine) -> None:
        if session.out.as_json:
            sys.stdout.write(json.dumps(line.as_json(), ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            time = f"[dim]{line.timestamp[11:19]:<8}[/dim] "
            session.out.console.print(time + service_line(line.service, line.text), soft_wrap=True)

    for line in last_lines(files, lines, wanted):
        show(line)
    if follow:
        for line in follow_files(files, wanted):
            show(line)
