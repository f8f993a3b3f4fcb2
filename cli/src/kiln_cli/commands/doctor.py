"""`kiln doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kiln_cli import exit_codes
from kiln_cli.session import MACHINE, Session, command


def register(app: typer.Typer) -> None:
    command(app, "doctor", examples=["kiln doctor", "kiln doctor --strict --json"], panel=MACHINE)(doctor)


def doctor(
    session: Session,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Also run a kernel, share weights between two processes, start a Redis and a sandbox; and"
            " count warnings as failures.",
        ),
    ] = False,
    port: Annotated[int, typer.Option(help="The port that kiln up is to have.", min=1, max=65535)] = 8420,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="The folder of kiln up. ~/.local/state/kiln when left out.",
            envvar="KILN_STATE_DIR",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Look at this machine and the running services, and say what to do about what is wrong.

    Exit code 1 when something failed. The JSON has a schema_version; names and states of checks are stable.
    """
    from kiln_cli.doctor.check import SCHEMA_VERSION, State, overall, run_checks, summary
    from kiln_cli.doctor.examination import checks, shower
    from kiln_cli.up.state_dir import default_state_dir

    folder = (state_dir or default_state_dir()).expanduser().resolve()
    show = (lambda name, finding: None) if session.out.as_json else shower(session.out.console)
    found = run_checks(checks(session.client, folder, port, is_strict=strict), show)
    state = overall(found, strict)
    report = {"schema_version": SCHEMA_VERSION, "state": state, "strict": strict, "checks": found}
    session.out.answer(report, lambda console: console.print(f"\n{summary(found)}", markup=False))
    return exit_codes.NO if state is State.FAILED else exit_codes.DONE
