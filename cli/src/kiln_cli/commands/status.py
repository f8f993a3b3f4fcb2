"""`kiln status`."""

from __future__ import annotations

import typer

from kiln_cli import exit_codes
from kiln_cli.session import SERVER, Session, command


def register(app: typer.Typer) -> None:
    @command(app, "status", examples=["kiln status", "kiln status --json"], panel=SERVER)
    def status(session: Session) -> int:
        """Say what a running server does: its model, training and adapters, and each engine's state, load and adapters.

        Exit code 0 when it can answer requests, also when a part of it is away; 3 when it cannot.
        """
        from kiln_cli.status import show_status

        found = session.client.health()
        session.out.answer(found, lambda console: show_status(console, session.client.base_url, found))
        return exit_codes.UNREACHABLE if found["status"] == "unavailable" else exit_codes.DONE
