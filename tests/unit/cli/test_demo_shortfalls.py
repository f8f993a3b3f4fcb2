"""A demonstration that did not show what it should says why."""

import pytest

from kiln_cli.demo.run import shortfalls
from kiln_cli.demo.statistics import Interval

_BEFORE = Interval(0.3, 0.2, 0.4, 60)


def test_nothing_is_missed_when_it_learned_and_lost_no_request():
    assert shortfalls(_BEFORE, Interval(0.8, 0.7, 0.9, 60), 0, 100) == []


@pytest.mark.parametrize(
    ("after", "how"),
    [(Interval(0.4, 0.35, 0.5, 60), "overlaps"), (Interval(0.1, 0.05, 0.15, 60), "lies below")],
)
def test_not_learned_names_both_intervals(after, how):
    (line,) = shortfalls(_BEFORE, after, 0, 100)
    assert line.startswith("not learned: ")
    assert f"{after.low:.3f} to {after.high:.3f}, {how} the one before, 0.200 to 0.400" in line


def test_failed_requests_are_counted():
    assert shortfalls(_BEFORE, Interval(0.8, 0.7, 0.9, 60), 3, 100) == ["3 of 100 requests failed"]
