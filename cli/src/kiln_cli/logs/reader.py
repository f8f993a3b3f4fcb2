"""Log lines of several services in the order of their time."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln_cli.errors import NoLogs

LEVELS = ("debug", "info", "warning", "error", "critical")
_POLL_S = 0.2


@dataclass(frozen=True)
class LogLine:
    """One line. `fields` is empty where the line is not one of ours, such as Redis' or a traceback's."""

    service: str
    text: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, service: str, text: str) -> LogLine:
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        return cls(service, text, fields if isinstance(fields, dict) and "event" in fields else {})

    @property
    def level(self) -> str:
        return str(self.fields.get("level", "info"))

    @property
    def timestamp(self) -> str:
        """ISO 8601 in UTC, as all services write it; "" where the line has none."""
        return str(self.fields.get("timestamp", ""))

    def as_json(self) -> dict[str, Any]:
        return {"service": self.service, **(self.fields or {"event": self.text, "level": "info"})}


@dataclass(frozen=True)
class LogFilter:
    """Which lines are wanted: at least this level, and containing this text."""

    level: str = "debug"
    text: str = ""

    def takes(self, line: LogLine) -> bool:
        known = line.level if line.level in LEVELS else "info"
        return LEVELS.index(known) >= LEVELS.index(self.level) and self.text in line.text


def log_files(folder: Path, services: Sequence[str]) -> dict[str, Path]:
    """File by service; all there are when none is named.

    Raises:
        NoLogs: there is no such folder, or no log of a service that was named.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if not found:
        raise NoLogs(f"there are no logs in {folder}")
    missing = [service for service in services if service not in found]
    if missing:
        raise NoLogs(f"there is no log of {', '.join(missing)}; there are {', '.join(found)}")
    return {name: path for name, path in found.items() if not services or name in services}


def last_lines(files: dict[str, Path], count: int, wanted: LogFilter) -> list[LogLine]:
    """The newest `count` lines of all files together, the oldest first."""
    lines: list[tuple[str, LogLine]] = []
    for service, path in files.items():
        newest: deque[tuple[str, LogLine]] = deque(maxlen=count)
        timestamp = ""
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                line = LogLine.of(service, text.rstrip("\n"))
                # A line without a time belongs to the one before it.
                timestamp = line.timestamp or timestamp
                if wanted.takes(line):
                    newest.append((timestamp, line))
        lines += newest
    lines.sort(key=lambda entry: entry[0])
    return [line for _, line in lines[-count:]]


def follow(files: dict[str, Path], wanted: LogFilter) -> Iterator[LogLine]:
    """Lines as they are written, without end; a file that is begun anew is read from its start."""
    positions = {service: path.stat().st_size for service, path in files.items()}
    while True:
        for service, path in files.items():
            positions[service], texts = _new_lines(path, positions[service])
            for text in texts:
                line = LogLine.of(service, text)
                if wanted.takes(line):
                    yield line
        time.sleep(_POLL_S)


def _new_lines(path: Path, position: int) -> tuple[int, list[str]]:
    """The position after the last whole line, and the whole lines up to it."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = position if position <= size else 0
        file.seek(start)
        data = file.read()
    whole, mark, _ = data.rpartition(b"\n")
    end = start + len(whole) + len(mark)
    return end, whole.decode(errors="replace").split("\n") if mark else []
