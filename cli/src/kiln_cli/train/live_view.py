"""Watching a job: a bar, the curve of what matters, speed, time left, place in the queue."""

from __future__ import annotations

import queue
import sys
import threading

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

import kiln
from kiln_cli.sparkline import sparkline

# The curve a recipe is judged by, and the other figures worth a line.
CURVE_OF = {"grpo": "reward_mean", "opd": "teacher_kl", "sft": "loss"}
_FIGURES = ("loss", "kl", "clip_fraction", "sampler_trainer_kl", "grad_norm", "learning_rate")
_QUEUE_CHECK_S = 1.0


class JobView:
    """What is known of a job, and how it looks now."""

    def __init__(self, state: kiln.JobState) -> None:
        self.state = state
        self.stage = state.status
        self.step, self.num_steps, self.num_tokens = state.step, state.num_steps, state.num_tokens
        self.eta_s = state.eta_s
        self.metrics = dict(state.metrics)
        self._curve_name = CURVE_OF.get(state.kind, "loss")
        self._curve: list[float] = []
        self._first_step: tuple[float, int] | None = None
        self._tokens_per_s: float | None = None

    def take(self, event: kiln.JobEvent) -> None:
        raw = event.raw
        if event.type != "step":
            self.stage = event.type
            return
        self.stage = "running"
        self.step, self.num_steps, self.num_tokens = raw["step"], raw["num_steps"], raw["num_tokens"]
        self.eta_s = raw.get("eta_s") or 0.0
        self.metrics = raw.get("metrics") or {}
        if self._curve_name in self.metrics:
            self._curve.append(self.metrics[self._curve_name])
        if self._first_step is None:
            self._first_step = (event.at_s, self.num_tokens)
        elif event.at_s > self._first_step[0]:
            tokens = self.num_tokens - self._first_step[1]
            self._tokens_per_s = tokens / (event.at_s - self._first_step[0])

    def __rich__(self) -> RenderableType:
        state = self.state
        name = state.raw.get("effective_config", {}).get("adapter", "")
        head = Table.grid(padding=(0, 2))
        place = ""
        if self.stage == "queued" and state.queue_position is not None:
            place = f", place {state.queue_position + 1} in the queue"
        head.add_row(
            f"[bold]{escape(state.id)}[/bold]", f"{state.kind} → {escape(name)}", f"{self.stage}{place}"
        )
        if not self.num_steps:
            return head
        bar = Table.grid(padding=(0, 2))
        left = f"{self.eta_s:.0f} s left" if self.step < self.num_steps else ""
        speed = f"{self._tokens_per_s:,.0f} tokens/s" if self._tokens_per_s else ""
        shown = ProgressBar(total=self.num_steps, completed=self.step, width=30)
        bar.add_row(shown, f"step {self.step}/{self.num_steps}", speed, left)
        return Group(head, bar, self._curve_line(), self._figures())

    def _curve_line(self) -> str:
        if not self._curve:
            return ""
        now = self._curve[-1]
        return f"{self._curve_name} [green]{sparkline(self._curve)}[/green] {now:.4g}"

    def _figures(self) -> str:
        names = [name for name in _FIGURES if name in self.metrics and name != self._curve_name]
        return "[dim]" + "  ".join(f"{name} {self.metrics[name]:.3g}" for name in names) + "[/dim]"


def watch(job: kiln.Job, console: Console) -> kiln.JobState:
    """Show the job until it has ended, and return how it ended. Without a terminal, a line a stage.

    Raises:
        kiln.KilnError: the server was away for too long.
    """
    if not console.is_terminal:
        line = kiln.ProgressLine(job.id, sys.stderr)
        for event in job.events():
            line.show(event)
        return job.refresh().state
    view = JobView(job.state)
    events: queue.SimpleQueue[kiln.JobEvent | BaseException | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(job, events), daemon=True).start()
    with Live(view, console=console, refresh_per_second=8, transient=False) as live:
        _follow(job, view, events)
        view.state = job.refresh().state
        view.stage = "gate not passed" if view.state.gate_passed is False else view.state.status
        live.refresh()
    return job.state


def _follow(
    job: kiln.Job, view: JobView, events: queue.SimpleQueue[kiln.JobEvent | BaseException | None]
) -> None:
    """Show events until the last; while the job waits, ask for its place in the queue."""
    while True:
        try:
            item = events.get(timeout=_QUEUE_CHECK_S)
        except queue.Empty:
            if view.stage == "queued":
                view.state = job.refresh().state
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        view.take(item)


def _pump(job: kiln.Job, events: queue.SimpleQueue[kiln.JobEvent | BaseException | None]) -> None:
    """The job's events, then None or what went wrong."""
    try:
        for event in job.events():
            events.put(event)
        events.put(None)
    except BaseException as error:  # noqa: BLE001 it is raised again where the events are read
        events.put(error)
