"""The commands, a module each; what they do lies in the packages beside this one."""

from __future__ import annotations

import typer

from kiln_cli.commands import (
    adapters,
    agent,
    bench,
    chat,
    data,
    doctor,
    evals,
    logs,
    models,
    quantize,
    status,
    train,
)
from kiln_cli.session import LEARNING, MACHINE


def register(app: typer.Typer) -> None:
    """Add them all."""
    status.register(app)
    chat.register(app)
    agent.register(app)
    bench.register(app)
    doctor.register(app)
    logs.register(app)
    quantize.register(app)
    app.add_typer(train.app, name="train", rich_help_panel=LEARNING)
    app.add_typer(adapters.app, name="adapters", rich_help_panel=LEARNING)
    app.add_typer(evals.app, name="eval", rich_help_panel=LEARNING)
    app.add_typer(data.app, name="data", rich_help_panel=LEARNING)
    app.add_typer(models.app, name="models", rich_help_panel=MACHINE)
