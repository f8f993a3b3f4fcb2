"""Following a job over a connection that may break: what the two clients share of it."""

from __future__ import annotations

import time
from typing import Any

from kiln.errors import (
    ConnectionFailed,
    GateNotPassed,
    JobCancelled,
    JobFailed,
    KilnError,
    UnavailableError,
    WaitTimedOut,
)
from kiln.values import JobEvent, JobState, JsonObject

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


class EventCursor:
    """Where a job's event stream is, so that a broken one goes on after the last event seen.

    A server that is away is asked again, at growing intervals, for `patience_s`.
    """

    def __init__(self, job_id: str, *, patience_s: float, timeout_s: float | None) -> None:
        self._job_id = job_id
        self._patience_s = patience_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._last_event_id = ""
        self._pause_s = _FIRST_PAUSE_S
        self._away_since: float | None = None
        self.has_ended = False

    def request(self) -> dict[str, Any]:
        """Keyword arguments of the next request for events."""
        return {"headers": {"Last-Event-ID": self._last_event_id} if self._last_event_id else {}}

    def saw(self, raw: JsonObject) -> JobEvent:
        event = JobEvent(id=raw["id"], type=raw["type"], at_s=raw.get("at_s", 0.0), raw=raw)
        self._last_event_id = event.id
        self._away_since, self._pause_s = None, _FIRST_PAUSE_S
        self.has_ended = event.is_end
        return event

    def broke_off(self, error: KilnError | None) -> float:
        """Seconds to wait before the next attempt. Raises `error` when patience is at its end."""
        self.check_deadline()
        if error is not None and not isinstance(error, ConnectionFailed | UnavailableError):
            raise error
        now = time.monotonic()
        self._away_since = self._away_since or now
        if error is not None and now - self._away_since > self._patience_s:
            raise error
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s

    def check_deadline(self) -> None:
        """Called at least with every line, and the server sends one every 15 seconds."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise WaitTimedOut(f"job {self._job_id} has not ended in time")


def check_outcome(state: JobState) -> None:
    """Raises JobFailed, JobCancelled or GateNotPassed when the job ended so."""
    if state.status == "failed":
        raise JobFailed(state)
    if state.status == "cancelled":
        raise JobCancelled(state)
    if state.gate_passed is False:
        raise GateNotPassed(state)
