"""What `kiln up --json` writes: one JSON object a line for each thing that happens to the services."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kiln_cli.up.console import UpConsole, how_it_ended


class UpJsonLines(UpConsole):
    """`{"event": "starting" | "service_ready" | "ready" | "service_exited" | …}`; no service's own lines."""

    def starting(self, model: str, state_dir: Path) -> None:
        _write("starting", model=model, state_dir=str(state_dir))

    def note(self, text: str) -> None:
        _write("note", text=text)

    def device_fault(self, names: Iterable[str]) -> None:
        _write("device_fault", services=list(names))

    def service_ready(self, name: str, seconds: float, detail: str) -> None:
        _write("service_ready", service=name, seconds=round(seconds, 3), detail=detail)

    def service_exited(self, name: str, code: int, delay_s: float) -> None:
        how = how_it_ended(name, code)
        _write("service_exited", service=name, exit_code=code, how=how, restart_in_s=delay_s)

    def all_ready(self) -> None:
        if not self._was_announced:
            self._was_announced = True
            _write("ready", url=self._url)

    def start_failed(self, name: str, last_lines: Iterable[str]) -> None:
        _write("start_failed", service=name, last_lines=list(last_lines))

    def settings_refused(self, name: str, lines: Iterable[str]) -> None:
        _write("settings_refused", service=name, last_lines=list(lines))

    def stopping(self) -> None:
        _write("stopping")

    def stopped(self) -> None:
        _write("stopped")

    def service_line(self, name: str, line: str) -> None:
        """kiln logs has these."""


def _write(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
    sys.stdout.flush()
