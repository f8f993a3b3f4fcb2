"""One thing looked at, and how it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 1


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it works, worse than it could
    FAILED = "failed"
    SKIPPED = "skipped"  # there is nothing to look at


@dataclass(frozen=True)
class Finding:
    """What a check found; `hint` says what to do where it is not ok."""

    state: State
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Check:
    """A name, stable for scripts, and the question. It may take seconds, and raises nothing."""

    name: str
    look: Callable[[], Finding]


def ok(detail: str) -> Finding:
    return Finding(State.OK, detail)


def run_checks(checks: Sequence[Check], on_found: Callable[[str, Finding], None]) -> list[dict[str, Any]]:
    """Look at each in its turn; a check that breaks is a finding too."""
    found = []
    for check in checks:
        started = time.monotonic()
        try:
            finding = check.look()
        except Exception as error:  # noqa: BLE001 the doctor goes on whatever it meets
            finding = Finding(
                State.FAILED, f"{type(error).__name__}: {error}", "This is a fault of kiln doctor."
            )
        on_found(check.name, finding)
        seconds = round(time.monotonic() - started, 3)
        found.append({"name": check.name, **asdict(finding), "seconds": seconds})
    return found


def summary(found: Sequence[dict[str, Any]]) -> str:
    """What the findings come to, in a line."""
    named = {
        state: ", ".join(entry["name"] for entry in found if entry["state"] == state)
        for state in (State.FAILED, State.WARNING)
    }
    if named[State.FAILED]:
        return f"not well: {named[State.FAILED]}"
    if named[State.WARNING]:
        return f"works, and could be better: {named[State.WARNING]}"
    is_served = any(entry["name"] == "gateway" and entry["state"] == State.OK for entry in found)
    return "all is well" if is_served else "this machine is fine, and no server answers; kiln up starts one"


def overall(found: Sequence[dict[str, Any]], is_strict: bool) -> State:
    """The worst of all; `is_strict` counts warnings as failures."""
    states = {entry["state"] for entry in found}
    if State.FAILED in states or (is_strict and State.WARNING in states):
        return State.FAILED
    return State.WARNING if State.WARNING in states else State.OK
