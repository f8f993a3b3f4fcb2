"""Asking before something that cannot be undone."""

from __future__ import annotations

import sys

import typer

from kiln_cli.errors import NotConfirmed


def confirm(question: str, is_agreed: bool) -> None:
    """Raises NotConfirmed when the answer is no, or when nobody is there to be asked."""
    if is_agreed:
        return
    try:
        is_confirmed = sys.stdin.isatty() and typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)  # the question's line has no end yet
        is_confirmed = False
    if not is_confirmed:
        raise NotConfirmed(f"not done: {question}")
