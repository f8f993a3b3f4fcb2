"""What the demo prints fits a terminal of 80 columns, and nothing of it is cut off."""

import inspect
import io

from rich.console import Console

from kiln_cli.demo import reward
from kiln_cli.demo.client import Sample
from kiln_cli.demo.learning import RoundResult
from kiln_cli.demo.report import DemoReport
from kiln_cli.demo.statistics import mean_interval


def _report(width: int) -> tuple[DemoReport, io.StringIO]:
    report, out = DemoReport(), io.StringIO()
    report.out = Console(file=out, width=width, highlight=False)
    return report, out


def test_the_rewards_source_is_shown_whole():
    report, out = _report(80)
    report.reward_source()
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "".join(inspect.getsource(reward).split()) in "".join(shown.split())


def test_a_round_is_one_line():
    report, out = _report(80)
    report.round("learning", 10, 10, RoundResult(1.0, 123.4, 1234.5, "courteous@10"))
    assert out.getvalue().count("\n") == 1
    assert "trained 123.4 s, live in 1234 ms" in out.getvalue()


def test_the_tables_fit():
    report, out = _report(80)
    interval = mean_interval([0.0, 1.0] * 40)
    report.table(interval, interval, interval)
    sample = Sample("Write a short email reply to Tom.", "Hi [Tom],\n\n" + "thank you " * 30, "c", 0, "base")
    report.examples([sample], [sample])
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "Hi [Tom]," in out.getvalue()
