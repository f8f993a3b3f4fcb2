"""Which checks make up `kiln doctor`, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import kiln
from kiln_cli.doctor import device, machine, services
from kiln_cli.doctor.check import Check, Finding, State

_MARKS = {
    State.OK: "[green]✓[/green]",
    State.WARNING: "[yellow]![/yellow]",
    State.FAILED: "[red]✗[/red]",
    State.SKIPPED: "[dim]–[/dim]",
}


def checks(client: kiln.Client, state_dir: Path, port: int, *, is_strict: bool) -> list[Check]:
    """In the order in which they are looked at: what others need comes first."""
    engines, trainers = (services.names_of(kind, state_dir) for kind in ("engine", "trainer"))
    names = ("registry", *engines, *trainers)
    found = [
        Check("python", machine.python),
        Check("packages", machine.packages),
        Check("memory", machine.memory),
        Check("disk", partial(machine.disk, state_dir)),
        Check("gpu", machine.gpu),
        Check("compiler", machine.compiler),
        Check("port", partial(machine.port, port)),
        Check("redis", partial(services.redis, state_dir, may_start=is_strict)),
        *(Check(name, partial(services.service, name, state_dir)) for name in names),
        Check("gateway", partial(services.gateway, client)),
    ]
    if is_strict:
        found += [
            Check("kernel", device.kernel),
            Check("shared_weights", device.shared_weights),
            Check("sandbox", device.isolation),
        ]
    return found


def shower(console: Console) -> Callable[[str, Finding], None]:
    """Prints each finding as it is found."""

    def show(name: str, finding: Finding) -> None:
        console.print(f"{_MARKS[finding.state]} {name:<15} {escape(finding.detail)}", soft_wrap=True)
        if finding.hint and finding.state is not State.OK:
            console.print(f"  {'':<15} {escape(finding.hint)}", style="dim", soft_wrap=True)

    return show
