"""What `kiln demo` prints: the reward's source, progress, the before/after table, the JSON line."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table

from kiln_cli.demo import reward
from kiln_cli.demo.client import Sample
from kiln_cli.demo.learning import RoundResult
from kiln_cli.demo.statistics import Interval

# Seconds on two CPU cores without other work, and how much longer it took on busy ones (docs/status.md).
_START_S, _ROUND_S, _BUSY = 15, 3.5, 2.5
# Before, after, and of the control.
_NUM_MEASUREMENTS = 3


class DemoReport:
    """Everything a person sees; the machine-readable line is printed by the caller, last."""

    def __init__(self) -> None:
        self.out = Console(highlight=False)
        self._bar: Progress | None = None

    def estimate(self, num_rounds: int) -> None:
        """How long it is going to take, from what was measured."""
        fastest_s = _START_S + _ROUND_S * num_rounds
        slowest_s = _BUSY * fastest_s
        self.out.print(
            f"Takes about {_round(fastest_s)} to {_round(slowest_s)} s on two CPU cores; "
            "on a GPU the first start compiles kernels as well, for up to some minutes where cores are few.\n"
        )

    @contextlib.contextmanager
    def progress(self, num_rounds: int) -> Iterator[None]:
        """A bar at a terminal: one part for each round of either adapter, and for each measurement."""
        columns = (
            TextColumn("  "),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal)
        with bar:
            self._bar = bar
            bar.add_task("", total=2 * num_rounds + _NUM_MEASUREMENTS)
            yield
        self._bar = None

    def advance(self) -> None:
        """One part more is done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def reward_source(self) -> None:
        self.out.print(
            "[bold]The reward[/bold] (cli/src/kiln_cli/demo/reward.py), any Python function would do:\n"
        )
        source = inspect.getsource(reward).rstrip()
        self.out.print(Syntax(source, "python", background_color="default", word_wrap=True))
        self.out.print()

    def step(self, text: str) -> None:
        self.out.print(f"  {text}")

    def round(self, label: str, number: int, num_rounds: int, result: RoundResult) -> None:
        bar = "█" * round(12 * result.reward_mean)
        self.out.print(
            f"  {label:<8} {number:>2}/{num_rounds}  reward {result.reward_mean:.2f} "
            f"[green]{bar:<12}[/green] trained {result.train_seconds:.1f} s, live in {result.swap_ms:.0f} ms"
        )
        self.advance()

    def table(self, before: Interval, after: Interval, control: Interval) -> None:
        table = Table(title="Mean reward on held-out prompts (0 to 1)", title_justify="left")
        for column in ("weights", "reward", "95 % interval", "samples"):
            table.add_column(column, justify="left" if column == "weights" else "right")
        rows = (
            ("base model, before", before),
            ("adapter, after learning", after),
            ("control, rewards shuffled", control),
        )
        for name, interval in rows:
            table.add_row(
                name,
                f"{interval.mean:.3f}",
                f"{interval.low:.3f} – {interval.high:.3f}",
                str(interval.num_samples),
            )
        self.out.print(table)

    def examples(self, before: Sequence[Sample], after: Sequence[Sample], count: int = 3) -> None:
        table = Table(title="The same prompts, before and after", title_justify="left", show_lines=True)
        for column in ("prompt", "before", "after"):
            table.add_column(column, ratio=1 if column == "prompt" else 2)
        answers_after = {sample.prompt: sample for sample in after}
        seen: set[str] = set()
        for sample in before:
            if sample.prompt in seen or sample.prompt not in answers_after:
                continue
            seen.add(sample.prompt)
            table.add_row(
                escape(sample.prompt), self._scored(sample), self._scored(answers_after[sample.prompt])
            )
            if len(seen) == count:
                break
        self.out.print(table)

    @staticmethod
    def _scored(sample: Sample) -> str:
        return f"{escape(sample.text)}\n[dim]reward {reward.score(sample.prompt, sample.text):.2f}[/dim]"


def _round(seconds: float) -> int:
    """To ten seconds."""
    return 10 * round(seconds / 10)
