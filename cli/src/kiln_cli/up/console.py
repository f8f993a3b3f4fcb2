"""What `kiln up` shows: one line for each service, the URL, and what went wrong."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

_COLOURS = {"redis": "red", "registry": "magenta", "engine": "yellow", "trainer": "green", "gateway": "cyan"}
# These let what they have begun end, or hand it on, when they are asked to stop.
_DRAINED = {"engine", "gateway"}
# SIGTERM or SIGINT while a service loads, met by Python or by kiln_common.stop_signals.
_STOPPED_EARLY = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
_LEVELS = {"warning", "error", "critical"}


class UpConsole:
    """Prints lifecycle lines always; service log lines from warnings up, or all when verbose.

    Every line is in the log files in any case.
    """

    def __init__(self, url: str, log_dir: Path, *, is_verbose: bool) -> None:
        self._out = Console(highlight=False)
        self._url = url
        self._log_dir = log_dir
        self._is_verbose = is_verbose
        self._was_announced = False

    def starting(self, model: str, state_dir: Path) -> None:
        self._out.print(f"[bold]Kiln[/bold] is starting with {escape(model)}")
        self._out.print(f"  state and logs in {escape(str(state_dir))}", style="dim")

    def note(self, text: str) -> None:
        self._out.print(f"  {escape(text)}", style="dim", soft_wrap=True)

    def device_fault(self, names: Iterable[str]) -> None:
        self._out.print(
            f"  [red]✗[/red] a fault on the GPU ended what shared it: {escape(' and '.join(names))} start again"
        )

    def service_ready(self, name: str, seconds: float, detail: str) -> None:
        self._out.print(
            f"  [green]✓[/green] {_tag(name)} ready in {seconds:.1f} s  [dim]{escape(detail)}[/dim]"
        )

    def service_exited(self, name: str, code: int, delay_s: float) -> None:
        mark = "[red]✗[/red]" if is_failure(code) else "[yellow]↻[/yellow]"
        how = how_it_ended(name, code)
        self._out.print(f"  {mark} {_tag(name)} {how}; starting it again in {delay_s:g} s")

    def all_ready(self) -> None:
        if self._was_announced:
            return
        self._was_announced = True
        self._out.print(f"\n  Ready: [bold]{self._url}[/bold]   OpenAI base URL: [bold]{self._url}/v1[/bold]")
        self._out.print("  Ctrl-C stops everything.\n", style="dim")

    def start_failed(self, name: str, last_lines: Iterable[str]) -> None:
        self._out.print(f"\n[red]{name} could not start.[/red] Its last lines:")
        for line in last_lines:
            self._out.print(f"  {escape(_readable(line)[1])}")
        self._out.print(f"  The whole log: {escape(str(self._log_dir / (name + '.log')))}", style="dim")

    def settings_refused(self, name: str, lines: Iterable[str]) -> None:
        self._out.print(f"\n[red]{name} cannot start like this, and trying again would not help:[/red]")
        for line in lines:
            self._out.print(f"  {escape(_readable(line)[1])}", soft_wrap=True)

    def stopping(self) -> None:
        self._out.print("  stopping …", style="dim")

    def stopped(self) -> None:
        self._out.print("  stopped", style="dim")

    def service_line(self, name: str, line: str) -> None:
        level, text = _readable(line)
        if self._is_verbose or level in _LEVELS:
            self._out.print(f"  {service_line(name, text)}", soft_wrap=True)


def last_words(lines: Iterable[str]) -> list[str]:
    """What a service printed behind its last log event: why it ended, in plain lines."""
    plain = list(itertools.takewhile(lambda line: not line.startswith("{"), reversed(list(lines))))
    return plain[::-1]


def is_failure(code: int) -> bool:
    """Whether nobody asked for this end of a service."""
    return code != 0 and code not in _STOPPED_EARLY


def how_it_ended(name: str, code: int) -> str:
    """What an exit code says, negative ones being signals."""
    if code in _STOPPED_EARLY:
        return "was stopped before it was ready"
    if code == 0:
        return "was drained and has ended" if name.partition("-")[0] in _DRAINED else "was stopped"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def service_line(name: str, line: str) -> str:
    """A service's log line as markup: who, and what."""
    return f"{_tag(name)} [dim]│[/dim] {escape(_readable(line)[1])}"


def _tag(name: str) -> str:
    return f"[{_COLOURS.get(name.partition('-')[0], 'white')}]{name:<9}[/]"


def _readable(line: str) -> tuple[str, str]:
    """Level and text of a log line: JSON events become "event key=value …"."""
    try:
        fields = json.loads(line)
        event, level = fields.pop("event"), fields.pop("level", "info")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "info", line
    for name in ("timestamp", "service"):
        fields.pop(name, None)
    rest = " ".join(f"{key}={value}" for key, value in fields.items())
    return level, f"{event} {rest}".rstrip()
