"""What `kiln status` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOURS = {"ok": "green", "degraded": "yellow", "draining": "yellow", "unavailable": "red"}


def show_status(console: Console, url: str, health: dict[str, Any]) -> None:
    """The answer of GET /health: a line for each subject, and a table of the engines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "server", f"{_coloured(health['status'])}  {escape(url)}  up {duration(health['uptime_s'])}"
    )
    table.add_row("model", escape(health.get("model") or "–"))
    table.add_row("training", _training(health.get("training")))
    table.add_row("adapters", _adapters(health.get("adapters")))
    away = [name for name, state in health["dependencies"].items() if state != "ok"]
    if away:
        table.add_row("away", f"[yellow]{', '.join(away)}[/yellow]; kiln doctor says what to do")
    console.print(table)
    if engines := health.get("engines"):
        console.print()
        console.print(_engines(engines))


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min, 3.4 h or 2.1 days."""
    for unit, length_s, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= length_s * (2 if unit == "min" else 1):
            return f"{seconds / length_s:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _coloured(state: str) -> str:
    return f"[{_COLOURS.get(state, 'white')}]{escape(state)}[/]"


def _engines(engines: Sequence[dict[str, Any]]) -> Table:
    # An address is shown to admins only; a socket of this machine is called like its engine.
    has_addresses = any(not engine.get("address", "unix:").startswith("unix:") for engine in engines)
    names = (
        "engine",
        *(("address",) if has_addresses else ()),
        "state",
        "device",
        "load",
        "tokens written",
        "adapters in memory",
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == "engine")
    for engine in engines:
        place = (str(engine.get("id", "")), *((engine.get("address", "–"),) if has_addresses else ()))
        table.add_row(*map(escape, place), _coloured(engine["status"]), *_figures(engine))
    return table


def _figures(engine: dict[str, Any]) -> tuple[str, str, str, str]:
    """Device, load, tokens written and adapters in memory; dashes where the engine does not answer."""
    scheduler = engine.get("scheduler")
    if not scheduler:
        return ("–",) * 4
    in_use = 100 * scheduler["pages_in_use"] / max(scheduler["pages_total"], 1)
    return (
        escape(f"{engine.get('device', '')}, {engine.get('dtype', '')}"),
        f"{scheduler['running']} running, {scheduler['waiting']} waiting, {in_use:.0f} % of the cache",
        f"{scheduler['generated_tokens_total']:,}",
        escape(", ".join(engine.get("resident_adapters", ())) or "none"),
    )


def _training(training: dict[str, Any] | None) -> str:
    if training is None:
        return "[yellow]the trainer does not answer[/yellow]"
    running = training.get("running_job_id")
    what = f"runs {escape(running)}" if running else "idle"
    trainers = training.get("trainers") or ()
    if len(trainers) > 1:
        num_running = sum(trainer["status"] == "running" for trainer in trainers)
        what = f"{num_running} of {len(trainers)} trainers at work"
    return f"{what}, {training.get('queued', 0)} waiting"


def _adapters(adapters: dict[str, Any] | None) -> str:
    if adapters is None:
        return "[yellow]the registry does not answer[/yellow]"
    attached = adapters.get("attached")
    answers = f"[bold]{escape(attached)}[/bold] answers" if attached else "the bare base model answers"
    return f"{adapters.get('count', 0)}; {answers} where a request names none"
