"""Jobs as a table, and one in full."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kiln
from kiln_cli.sparkline import sparkline
from kiln_cli.status import duration
from kiln_cli.train.live_view import CURVE_OF
from kiln_cli.train.submit import outcome

_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def show_jobs(console: Console, jobs: list[kiln.JobState]) -> None:
    """The newest first."""
    if not jobs:
        console.print("no jobs yet; kiln train sft --help has an example")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("job", "recipe", "adapter", "status", "step", "age"):
        table.add_column(name, overflow="fold", no_wrap=name == "job")
    for state in jobs:
        created = state.raw.get("created_at")
        table.add_row(
            escape(state.id),
            state.kind,
            escape(_published_or_meant(state)),
            ended_as(state),
            f"{state.step}/{state.num_steps}" if state.num_steps else "",
            duration(max(time.time() - created, 0)) if created else "",
        )
    console.print(table)


def show_job(console: Console, state: kiln.JobState) -> None:
    """One job: how far it is, its curve, its settings, how it ended."""
    console.print(f"[bold]{escape(state.id)}[/bold]  {state.kind}  {ended_as(state)}")
    if state.status == "queued" and state.queue_position is not None:
        console.print(f"  place {state.queue_position + 1} in the queue")
    if state.num_steps:
        console.print(f"  step {state.step} of {state.num_steps}, {state.num_tokens:,} tokens")
    name = CURVE_OF.get(state.kind, "loss")
    curve = [entry[name] for entry in state.history if name in entry]
    if curve:
        console.print(f"  {name} [green]{sparkline(curve)}[/green] {curve[0]:.4g} → {curve[-1]:.4g}")
    settings = state.raw.get("effective_config") or {}
    shown = {key: settings[key] for key in ("adapter", "learning_rate", "epochs", "seed") if key in settings}
    console.print(
        "  " + "  ".join(f"{key} {value}" for key, value in shown.items()), markup=False, style="dim"
    )
    for warning in state.warnings:
        console.print(f"  warning: {warning}", markup=False, style="yellow")
    if state.has_ended:
        console.print(f"  {outcome(state)}", markup=False)


def _published_or_meant(state: kiln.JobState) -> str:
    published = None if state.gate_passed is False else state.version
    return published or state.raw.get("effective_config", {}).get("adapter", "")


def ended_as(state: kiln.JobState) -> str:
    """Its status; a job whose gate refused the result has succeeded in nothing that was asked for."""
    return "[yellow]gate not passed[/]" if state.gate_passed is False else coloured(state.status)


def coloured(status: str) -> str:
    return f"[{_COLOURS.get(status, 'white')}]{escape(status)}[/]"
