"""The newest lines of the log files in a folder, one file a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIRST_BYTES = 32 * 1024
_MOST_BYTES = 256 * 1024
_LONGEST_LINE = 4000


class LogTail:
    """Reads what was added to *.log since the last call; the first call gives each file's end.

    A file that became shorter was replaced, and is read from its start. Blocking: call it on a thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read(self) -> list[dict[str, Any]]:
        """New whole lines of all files, in the order of their times as far as they have any."""
        lines: list[dict[str, Any]] = []
        for path in sorted(self._folder.glob("*.log")):
            try:
                lines += [_line(path.stem, text) for text in self._new_lines(path)]
            except OSError:
                continue  # it was moved away just now
        lines.sort(key=lambda line: line["at"])
        return lines

    def _new_lines(self, path: Path) -> list[str]:
        size = path.stat().st_size
        offset = self._offsets.get(path)
        is_inside_line = False
        if offset is None:
            offset = max(0, size - _FIRST_BYTES)
            is_inside_line = offset > 0
        elif size < offset:
            offset = 0
        elif size - offset > _MOST_BYTES:
            offset, is_inside_line = size - _MOST_BYTES, True
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(size - offset)
        whole, newline, _ = raw.rpartition(b"\n")
        self._offsets[path] = offset + len(whole) + len(newline)
        lines = whole.decode("utf-8", "replace").split("\n") if newline else []
        return [line for line in lines[1 if is_inside_line else 0 :] if line.strip()]


def _line(service: str, text: str) -> dict[str, Any]:
    """A line's time, level, event and fields; a line that is not JSON is its own event."""
    try:
        fields = json.loads(text)
        event = str(fields.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"service": service, "at": "", "level": "info", "event": text[:_LONGEST_LINE], "fields": {}}
    at, level = str(fields.pop("timestamp", "")), str(fields.pop("level", "info"))
    fields.pop("service", None)
    shown = {name: str(value)[:_LONGEST_LINE] for name, value in fields.items()}
    return {"service": service, "at": at, "level": level, "event": event, "fields": shown}
