"""Estimates and totals of accepted drafts."""

from __future__ import annotations

import pytest

from kiln_engine.speculation.acceptance import AcceptanceBook, AcceptanceRates, DraftTotals


def test_places_behind_the_first_rejected_draft_tell_nothing():
    rates = AcceptanceRates([0.5, 0.5, 0.5, 0.5])
    rates.observe(num_proposed=3, num_accepted=1)
    assert rates.rates == (pytest.approx(5 / 9), pytest.approx(4 / 9), 0.5, 0.5)


def test_what_all_drafts_passed_raises_every_place_that_was_proposed():
    rates = AcceptanceRates([0.5, 0.5, 0.5])
    rates.observe(num_proposed=2, num_accepted=2)
    assert rates.rates == (pytest.approx(5 / 9), pytest.approx(5 / 9), 0.5)


def test_chances_multiply():
    assert AcceptanceRates([0.8, 0.5, 0.5]).chances == pytest.approx((0.8, 0.4, 0.2))


def test_estimates_come_close_to_the_truth_and_follow_it():
    rates = AcceptanceRates([0.6])
    for number in range(100):
        rates.observe(1, int(number % 4 != 0))
    assert rates.rates[0] == pytest.approx(0.75, abs=0.1)
    for _ in range(100):
        rates.observe(1, 0)
    assert rates.rates[0] < 0.05


def test_a_sequence_begins_with_what_is_known_of_its_adapter():
    book = AcceptanceBook(2)
    first = book.begin("billing")
    for _ in range(200):
        first.observe(2, 0)
    assert book.begin("billing").estimate.rates[0] < 0.1
    assert book.begin("other").estimate.rates == book.begin("").estimate.rates == (0.6, 0.6)


def test_one_bad_sequence_changes_its_own_estimate_more_than_its_adapters():
    book = AcceptanceBook(1)
    for _ in range(50):
        book.begin("").observe(1, 1)
    bad = book.begin("")
    for _ in range(20):
        bad.observe(1, 0)
    assert bad.estimate.rates[0] < 0.3
    assert book.begin("").estimate.rates[0] > 0.6


def test_totals_are_kept_by_adapter():
    book = AcceptanceBook(3)
    base, billing = book.begin(""), book.begin("billing")
    book.begin("silent")
    base.observe(3, 2)
    base.observe(3, 0)
    billing.observe(1, 1)
    assert book.totals() == (DraftTotals("", 6, 2), DraftTotals("billing", 1, 1))


def test_the_adapter_longest_unused_gives_way():
    book = AcceptanceBook(1)
    for number in range(257):
        book.begin(f"a{number}").observe(1, 1)
        book.begin("kept").observe(1, 1)
    names = {totals.adapter for totals in book.totals()}
    assert len(names) == 256
    assert "kept" in names
    assert "a0" not in names
