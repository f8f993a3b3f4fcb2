"""One line that follows a job: what `job.wait(progress=True)` writes to standard error."""

from __future__ import annotations

import sys
from typing import TextIO

from kiln.values import JobEvent

_BAR_WIDTH = 24
_SHOWN_METRICS = ("reward_mean", "teacher_kl", "loss")


class ProgressLine:
    """Rewritten in place on a terminal; elsewhere a line at each tenth of the way, and at the end."""

    def __init__(self, job_id: str, out: TextIO | None = None) -> None:
        self._job_id = job_id
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty()
        self._shown_tenth = -1

    def show(self, event: JobEvent) -> None:
        if event.type == "step":
            self._step(event)
        else:
            version = event.raw.get("version")
            what = f" {event.raw.get('adapter')}@{version}" if version else ""
            self._write(f"{self._job_id} {event.type}{what}", is_last=event.is_end)

    def _step(self, event: JobEvent) -> None:
        step, num_steps = event.raw["step"], max(event.raw["num_steps"], 1)
        tenth = 10 * step // num_steps
        if not self._is_terminal and tenth == self._shown_tenth:
            return
        self._shown_tenth = tenth
        filled = _BAR_WIDTH * step // num_steps
        metrics = event.raw.get("metrics", {})
        shown = next((f"{name} {metrics[name]:.3f}" for name in _SHOWN_METRICS if name in metrics), "")
        bar = "━" * filled + "─" * (_BAR_WIDTH - filled)
        self._write(
            f"{self._job_id} {bar} {step}/{num_steps} {shown} {event.raw.get('eta_s') or 0:.0f} s left"
        )

    def _write(self, text: str, *, is_last: bool = False) -> None:
        if self._is_terminal:
            self._out.write(f"\r\x1b[K{text}" + ("\n" if is_last else ""))
        else:
            self._out.write(text + "\n")
        self._out.flush()
