"""Training data from a JSONL file, in the forms that people keep it in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln_cli.errors import FileUnreadable, InvalidJsonl

_MOST_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One line's object and where it stood."""

    line: int
    fields: dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """The objects of a JSONL file, or of standard input for "-". Empty lines are skipped.

    Raises:
        FileUnreadable: there is no such file, or it is not UTF-8 text.
        InvalidJsonl: lines are not JSON objects, or there are none; all of them are named.
    """
    rows, faults = [], []
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if isinstance(fields, dict):
            rows.append(Row(number, fields))
        else:
            faults.append(f"line {number}: not an object but {type(fields).__name__}")
    if faults:
        raise InvalidJsonl(_listed(source, faults))
    if not rows:
        raise InvalidJsonl(f"{source} has no lines")
    return rows


def _lines(source: str) -> Iterator[str]:
    if source == "-":
        yield from sys.stdin
        return
    try:
        # Not splitlines: JSON's strings may hold U+2028 and U+0085 as they are.
        yield from Path(source).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileUnreadable(
            f"{source} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _listed(source: str, faults: list[str]) -> str:
    shown = "; ".join(faults[:_MOST_SHOWN])
    more = f"; and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
    return f"{source} has {len(faults)} broken lines: {shown}{more}"


def grpo_groups(source: str, rows: list[Row]) -> tuple[list[dict[str, Any]], list[int]]:
    """GRPO groups out of rows, each with the line it begins on.

    A row is a group (`completions` or `rollouts`), or one scored answer: `prompt` or `messages` with
    `completion` and `reward`, or `completion_id` (and `index`) with `reward`. Answers to the same prompt
    form a group; answers by id do with the same `group`, or else the same id.

    Raises:
        InvalidJsonl: rows are none of these.
    """
    groups: dict[str, dict[str, Any]] = {}
    lines: list[int] = []
    faults = []
    for row in rows:
        fields = row.fields
        if "completions" in fields or "rollouts" in fields:
            groups[f"line {row.line}"] = fields
            lines.append(row.line)
        elif "reward" in fields and "completion_id" in fields:
            entry = {name: value for name, value in fields.items() if name != "group"}
            key = f"id {fields.get('group', fields['completion_id'])}"
            _append(groups, lines, key, row.line, {"rollouts": []}, "rollouts", entry)
        elif "reward" in fields and "completion" in fields and ("prompt" in fields or "messages" in fields):
            asked: dict[str, Any] = {
                name: fields[name] for name in ("prompt", "messages", "tools") if name in fields
            }
            entry = {"text": fields["completion"], "reward": fields["reward"]}
            key = json.dumps(asked, sort_keys=True)
            _append(groups, lines, key, row.line, {**asked, "completions": []}, "completions", entry)
        else:
            faults.append(
                f"line {row.line}: neither a group nor a scored answer (it has {', '.join(sorted(fields)[:6])})"
            )
    if faults:
        raise InvalidJsonl(
            _listed(source, faults),
            hint='A line is {"prompt", "completion", "reward"}, {"completion_id", "index", "reward"}, or a '
            'group {"prompt", "completions": [{"text", "reward"}]}.',
        )
    return list(groups.values()), lines


def _append(
    groups: dict[str, dict[str, Any]],
    lines: list[int],
    key: str,
    line: int,
    empty: dict[str, Any],
    name: str,
    entry: dict[str, Any],
) -> None:
    if key not in groups:
        groups[key] = empty
        lines.append(line)
    groups[key][name].append(entry)


def line_of_field(param: str | None, lines: list[int]) -> int | None:
    """The line behind a refused field: "examples[3].completion" is the fourth entry's."""
    found = re.match(r"(?:examples|groups|prompts)\[(\d+)\]", param or "")
    index = int(found[1]) if found else -1
    return lines[index] if 0 <= index < len(lines) else None
