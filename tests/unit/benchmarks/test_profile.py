"""Charging the time of a step to kernels that overlap."""

import pytest

from benchmarks.engine.profile import Span, charge, table


def test_what_overlaps_is_charged_once():
    # b is launched while a runs and waits for it; then nothing runs until c.
    charges = charge([Span(0, 10, "a"), Span(4, 15, "b"), Span(20, 22, "c")])
    assert {name: own.charged_us for name, own in charges.items()} == {"a": 10, "b": 5, "c": 2}
    assert charges["b"].resident_us == 11


def test_each_moment_is_charged_to_the_kernel_that_ends_first():
    charges = charge([Span(0, 10, "long"), Span(2, 4, "short"), Span(5, 7, "short"), Span(-1, 12, "longest")])
    assert charges["short"].charged_us == 4
    assert charges["long"].charged_us == 6
    assert charges["longest"].charged_us == 3


def test_the_table_is_per_step():
    spans = [
        span for i in range(4) for span in (Span(10 * i, 10 * i + 6, "a"), Span(10 * i + 6, 10 * i + 9, "b"))
    ]
    lines = table(1e-5, spans, 5)
    assert "10 us" in lines[0]
    assert lines[1].split()[-1] == "a"
    assert float(lines[1].split()[0]) == pytest.approx(1, rel=0.05)
