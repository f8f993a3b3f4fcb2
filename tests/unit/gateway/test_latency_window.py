"""Percentiles of the last seconds, beside exact ones."""

import random
import statistics

import pytest

from kiln_gateway.insight.latency_window import LatencyWindow


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_percentiles_are_within_a_bucket_of_the_truth():
    draw = random.Random(1)
    durations = [draw.lognormvariate(-4, 1.5) for _ in range(5000)]
    window = LatencyWindow(15, Clock())
    for duration in durations:
        window.add(duration)
    exact = statistics.quantiles(durations, n=100)
    p50, p99 = window.percentiles(0.5, 0.99)
    # Half a bucket is 5 %; ranks between two samples add a little.
    assert p50 == pytest.approx(exact[49], rel=0.06)
    assert p99 == pytest.approx(exact[98], rel=0.08)


def test_what_is_older_than_the_window_is_forgotten():
    clock = Clock()
    window = LatencyWindow(15, clock)
    assert window.percentiles(0.5) == [None]
    window.add(5.0)
    clock.now += 14
    window.add(0.01)
    assert window.percentiles(1.0) == [pytest.approx(5.0, rel=0.06)]
    clock.now += 1
    assert window.percentiles(1.0) == [pytest.approx(0.01, rel=0.06)]
    clock.now += 100
    assert window.percentiles(0.5) == [None]


def test_durations_beyond_all_buckets_count_too():
    window = LatencyWindow(15, Clock())
    window.add(0.0)
    window.add(1e6)
    least, most = window.percentiles(0.5, 1.0)
    assert least < 1e-4
    assert most > 600
