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


def test_it_says_beforehand_about_how_long_it_takes():
    for num_rounds, words in ((16, "about 70 to 180 s"), (2, "about 20 to 60 s")):
        report, out = _report(200)
        report.estimate(num_rounds)
        assert words in out.getvalue()


def test_a_terminal_has_a_bar_that_ends_with_the_last_measurement():
    report, out = _report(80)
    with report.progress(num_rounds=1):
        report.advance()
    assert out.getvalue() == ""  # in a file there are the lines alone
    report.out = Console(file=out, width=80, force_terminal=True)
    with report.progress(num_rounds=1):
        report.advance()
        for label in ("learning", "control"):
            report.round(label, 1, 1, RoundResult(1.0, 1.0, 1.0, "a@1"))
        assert not report._bar.finished
        report.advance()
        report.advance()
        assert report._bar.finished
    assert "left" in out.getvalue()


def test_the_tables_fit():
    report, out = _report(80)
    interval = mean_interval([0.0, 1.0] * 40)
    report.table(interval, interval, interval)
    sample = Sample("Write a short email reply to Tom.", "Hi [Tom],\n\n" + "thank you " * 30, "c", 0, "base")
    report.examples([sample], [sample])
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "Hi [Tom]," in out.getvalue()
