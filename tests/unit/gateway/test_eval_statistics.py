"""Intervals and tests against figures worked out another way."""

import random

import pytest

from kiln_gateway.evals.statistics import compare, mcnemar, mean_interval, wilson


@pytest.mark.parametrize(
    ("num_right", "num_cases", "low", "high"),
    # From the formula solved for p by bisection of |share - p| = z sqrt(p (1 - p) / n).
    [
        (0, 10, 0.0, 0.2775328),
        (8, 10, 0.4901624, 0.9433179),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_interval_solves_its_equation(num_right, num_cases, low, high):
    assert wilson(num_right, num_cases) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    draw, truth = random.Random(1), 0.3
    rights = [sum(draw.random() < truth for _ in range(40)) for _ in range(2000)]
    covered = sum(low <= truth <= high for low, high in (wilson(right, 40) for right in rights))
    assert 0.93 < covered / 2000 < 0.98  # three standard errors are 0.015


def test_binary_scores_get_wilson_and_others_a_bootstrap():
    assert mean_interval([1.0, 0.0, 1.0, 1.0]).method == "wilson"
    graded = mean_interval([0.25, 0.5, 0.75, 1.0] * 25)
    assert graded.method == "bootstrap"
    # The normal approximation: 0.625 +- 1.96 * 0.2795 / 10; resampling noise is about 0.002.
    assert (graded.low, graded.high) == pytest.approx((0.5702, 0.6798), abs=0.008)


@pytest.mark.parametrize(
    # Binomial tails with one half: 2 * (1 + 10 + 45) / 1024, and so on.
    ("num_better", "num_worse", "p_value"),
    [(0, 0, 1.0), (8, 2, 0.109375), (5, 0, 0.0625), (3, 3, 1.0), (10, 0, 2 / 1024)],
)
def test_mcnemar_is_the_exact_binomial_test(num_better, num_worse, p_value):
    assert mcnemar(num_better, num_worse) == pytest.approx(p_value)
    assert mcnemar(num_worse, num_better) == pytest.approx(p_value)


def test_mcnemar_takes_thousands_of_changes():
    assert mcnemar(5000, 5000) == 1.0
    assert mcnemar(6000, 4000) < 1e-15


def test_versions_are_compared_case_by_case():
    baseline = [0.0] * 10 + [1.0] * 10
    candidate = [1.0] * 8 + [0.0] * 2 + [1.0] * 9 + [0.0]
    found = compare(baseline, candidate)
    assert (found.num_better, found.num_worse, found.num_same) == (8, 1, 11)
    assert found.difference.mean == pytest.approx(0.35)
    assert found.difference.low < 0.35 < found.difference.high
    assert (found.test, found.p_value) == ("mcnemar_exact", pytest.approx(2 * 10 / 512))


def test_graded_scores_are_compared_by_permutation():
    better = compare([0.2, 0.4, 0.6] * 10, [0.4, 0.6, 0.8] * 10)
    assert better.test == "paired_permutation"
    assert better.p_value < 0.002
    same = compare([0.5, 0.25, 0.75], [0.5, 0.25, 0.75])
    assert (same.p_value, same.difference.mean) == (1.0, 0.0)
