"""What `kiln demo` prints: the reward's source, progress, the before/after table, the JSON line."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from kiln_cli.demo import reward
from kiln_cli.demo.client import Sample
from kiln_cli.demo.learning import RoundResult
from kiln_cli.demo.statistics import Interval


class DemoReport:
    """Everything a person sees; the machine-readable line is printed by the caller, last."""

    def __init__(self) -> None:
        self.out = Console(highlight=False)

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
