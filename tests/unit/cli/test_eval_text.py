"""How evaluations are shown."""

import io

from rich.console import Console

from kiln_cli.evals.runs import is_worse, show_comparison, show_run

SCORE = {"mean": 0.75, "low": 0.5, "high": 0.9, "num_cases": 4}


def text_of(show, value):
    console = Console(width=100, file=io.StringIO())
    show(console, value)
    return console.file.getvalue()


def test_a_run_shows_score_interval_and_cases():
    run = {
        "id": "evalrun_1",
        "adapter": "polite@2",
        "suite": {"name": "sums", "version": 1},
        "status": "succeeded",
        "score": SCORE,
        "num_invalid": 1,
        "by_scorer": {"numeric": SCORE},
        "cases": [{"index": 0, "score": 0.0, "answer": "four\n[not five]", "detail": "no number"}],
    }
    shown = text_of(show_run, run)
    assert "polite@2 on sums@1  evalrun_1  succeeded" in shown
    assert "score 0.750 (0.500 to 0.900)" in shown
    assert "1 answers had not the form" in shown
    assert "four [not five]" in shown


def test_a_comparison_says_how_sure_the_difference_is():
    found = {
        "baseline": {"adapter": "base", "score": SCORE},
        "candidate": {"adapter": "polite@2", "score": SCORE},
        "difference": {"mean": -0.25, "low": -0.4, "high": -0.1},
        "num_better": 1,
        "num_worse": 9,
        "num_same": 10,
        "p_value": 0.0215,
        "test": "mcnemar_exact",
    }
    shown = text_of(show_comparison, found)
    assert "-0.250 (-0.400 to -0.100)" in shown
    assert "1 better, 9 worse, 10 the same; p = 0.0215" in shown
    assert is_worse(found)
    assert not is_worse({"difference": {"high": 0.0}})
