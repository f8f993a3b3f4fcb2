"""Draft lengths follow cost and acceptance, under simulated costs.

The costs are those of an H200 at the 4B shape as planned: few rows hardly notice a few more tokens,
256 rows are bound by arithmetic.
"""

from __future__ import annotations

import math

import pytest

from kiln_engine.speculation.acceptance import AcceptanceBook, AcceptanceRates
from kiln_engine.speculation.policy import DraftPolicy
from kiln_engine.speculation.step_costs import StepCosts
from tests.support.speculation import (
    MAX_DRAFTS,
    ROW_SIZES,
    DraftingRows,
    linear_cost,
    new_policy,
)

ONE_ROW = linear_cost(2.2e-3, 0.03, 0.07)
SIXTEEN_ROWS = linear_cost(2.7e-3, 0.08, 0.08)
SIXTY_FOUR_ROWS = linear_cost(3.9e-3, 0.45, 0.10)
FULL_BATCH = linear_cost(9e-3, 0.85, 0.10)


def rows(count: int, cost, acceptance: float = 0.7, **options) -> DraftingRows:
    return DraftingRows(new_policy(), [acceptance] * count, cost, **options)


def test_one_row_drafts_and_is_faster():
    drafting = rows(1, ONE_ROW)
    assert drafting.speed(3000) > 1.8


def test_sixteen_rows_draft_and_are_faster():
    assert rows(16, SIXTEEN_ROWS).speed(1000) > 1.4


@pytest.mark.parametrize("first", [1.0, 2.0])
def test_a_row_drafts_far_where_one_draft_hardly_pays(first):
    """Steps with drafts wait for the host, however many there are, and the first of a length for more."""

    def seconds(verified: int, drafted: int) -> float:
        waited = 0.9e-3 if verified or drafted else 0.0
        return 2.6e-3 + waited + 0.08e-3 * verified + 0.4e-3 * drafted

    for seed in range(4):
        assert rows(1, seconds, seed=seed, first=first).run(100).speed(500) > 1.2


@pytest.mark.parametrize(("count", "cost"), [(64, SIXTY_FOUR_ROWS), (256, FULL_BATCH)])
@pytest.mark.parametrize("acceptance", [0.0, 0.3])
def test_where_drafts_do_not_pay_they_cost_less_than_two_percent(count, cost, acceptance):
    drafting = rows(count, cost, acceptance, noise=0.05).run(300)
    assert drafting.speed(1500) > 0.98
    assert drafting.steps_by_length[0] > 0.95 * drafting.num_steps


@pytest.mark.parametrize("acceptance", [0.0, 0.1])
def test_one_row_whose_drafts_are_wrong_decodes_plainly(acceptance):
    drafting = rows(1, linear_cost(2.2e-3, 0.06, 0.08), acceptance).run(500)
    assert drafting.speed(3000) > 0.98


def test_the_length_grows_with_acceptance():
    def mean_length(acceptance: float) -> float:
        done = rows(8, linear_cost(2.5e-3, 0.1, 0.1), acceptance, seed=1).run(1500)
        return sum(n * count for n, count in enumerate(done.steps_by_length)) / done.num_steps

    lengths = [mean_length(acceptance) for acceptance in (0.1, 0.5, 0.9)]
    assert lengths[0] < 0.2 < lengths[1] < 3 < lengths[2]


def test_drafts_end_when_acceptance_falls_and_come_back_when_it_rises():
    drafting = rows(1, ONE_ROW, 0.8).run(500)
    drafting.acceptance = [0.0]
    drafting.run(200)
    assert drafting.speed(2000) > 0.97
    drafting.acceptance = [0.8]
    drafting.run(3000)
    assert drafting.speed(1000) > 1.8


def test_drafts_follow_what_steps_cost_while_others_use_the_device():
    """Steps become dearer, drafts more than the rest, and cheap again."""
    drafting = rows(16, SIXTEEN_ROWS, noise=0.03).run(300)
    drafting.step_seconds = linear_cost(5e-3, 0.6, 0.3)
    drafting.run(300)
    assert drafting.speed(2000) > 0.98
    drafting.step_seconds = SIXTEEN_ROWS
    drafting.run(4000)
    assert drafting.speed(500) > 1.4


def test_drafts_end_when_only_plain_steps_become_cheaper():
    drafting = rows(16, linear_cost(5e-3, 0.1, 0.05)).run(300)
    assert drafting.lengths[0] > 0
    drafting.step_seconds = lambda verified, drafted: 1.5e-3 if verified + drafted == 0 else 7e-3
    drafting.run(3000)
    assert drafting.speed(1000) > 0.97


def test_disturbed_measurements_change_little():
    calm = rows(16, SIXTEEN_ROWS, seed=3).speed(2000)
    assert rows(16, SIXTEEN_ROWS, seed=3, noise=0.05, outliers=0.05).speed(2000) > 0.93 * calm
    disturbed = rows(256, FULL_BATCH, 0.3, noise=0.1, outliers=0.05).run(300)
    assert disturbed.speed(1000) > 0.98


def test_a_row_whose_drafts_are_wrong_drafts_less_than_its_neighbour():
    drafting = DraftingRows(new_policy(), [0.9, 0.0], linear_cost(2.3e-3, 0.1, 0.1)).run(400)
    totals = [0, 0]
    for _ in range(200):
        drafting.run(1)
        totals = [total + length for total, length in zip(totals, drafting.lengths, strict=True)]
    assert totals[0] > 400
    assert totals[1] < 40


def measured_policy(num_rows: int, cost, lengths=range(MAX_DRAFTS + 1)) -> DraftPolicy:
    """A policy that has measured these lengths; the first step of a kind does not count."""
    policy = new_policy()
    for length in lengths:
        for _ in range(4):
            policy.observe(num_rows, length, length, cost(length, length))
    return policy


def test_rows_that_cannot_draft_now_have_none():
    policy = measured_policy(2, ONE_ROW)
    can = AcceptanceBook(MAX_DRAFTS).begin("").estimate
    assert policy.choose([None, None]) == [0, 0]
    assert policy.choose([]) == []
    none, some = policy.choose([None, can])
    assert none == 0
    assert some > 0


def test_what_a_step_has_room_for_is_compared_with_plain_decoding_and_no_longer_draft():
    def seconds(verified: int, drafted: int) -> float:
        return (1.0, 1.9, 1.9, 2.0, 2.1)[verified]

    policy = measured_policy(1, seconds)
    likely = AcceptanceRates([0.8] * MAX_DRAFTS)
    assert policy.choose([likely]) == [MAX_DRAFTS]
    assert policy.choose([likely], 1) == [0]
    assert policy.choose([likely], 0) == [0]


def test_plain_steps_are_measured_before_there_are_drafts():
    policy = new_policy()
    estimate = AcceptanceRates([0.9] * MAX_DRAFTS)
    for _ in range(4):
        assert policy.choose([estimate]) == [0]
        policy.observe(1, 0, 0, 1e-3)
    assert policy.choose([estimate]) == [MAX_DRAFTS]


def test_a_first_plain_step_that_takes_long_does_not_make_drafts_look_cheap():
    drafting = rows(64, SIXTY_FOUR_ROWS, 0.0, first=5.0).run(40)
    assert drafting.steps_by_length[0] > 40 - 2 * 5


def test_a_longer_draft_is_tried_where_one_alone_does_not_pay():
    """Nothing says that two cost as much more than one as one costs more than none."""

    def seconds(verified: int, drafted: int) -> float:
        return 3.1e-3 if verified + drafted == 0 else 5.3e-3 + 0.3e-3 * drafted

    assert rows(16, seconds).run(40).speed(300) > 1.25


def test_the_same_calls_give_the_same_lengths():
    runs = [rows(4, SIXTEEN_ROWS, 0.5, noise=0.1, seed=5).run(500) for _ in range(2)]
    assert runs[0].steps_by_length == runs[1].steps_by_length


def measured_costs(cells, max_drafts: int) -> StepCosts:
    """Costs of `(rows, drafts): seconds`, measured as often as it takes."""
    costs = StepCosts(ROW_SIZES, max_drafts)
    for (num_rows, num_drafts), seconds in cells.items():
        for _ in range(3):
            costs.observe(num_rows, num_drafts, seconds)
    return costs


def test_a_first_step_does_not_count_and_one_more_is_not_enough():
    costs = StepCosts(ROW_SIZES, 1)
    assert costs.seconds(1, 1) is None
    assert not costs.observe(1, 0, 9.0)
    assert costs.observe(1, 0, 9.0)
    assert costs.seconds(1, 1) is None
    assert costs.observe(1, 0, 1.0)
    assert costs.seconds(1, 0) == [1.0]


def test_lengths_not_measured_cost_no_more_than_the_next_longer_one():
    costs = measured_costs({(1, 0): 1.0, (1, 2): 1.5}, max_drafts=3)
    assert costs.seconds(1, 3) == [1.0, 1.5, 1.5, math.inf]
    assert costs.seconds(1, 1) == [1.0, 1.5]


def test_a_size_not_measured_has_the_share_of_the_nearest_one():
    costs = measured_costs(
        {(1, 0): 1.0, (1, 1): 1.1, (64, 0): 4.0, (64, 1): 8.0, (40, 0): 3.0, (2, 0): 1.0}, max_drafts=1
    )
    assert costs.seconds(33, 1) == pytest.approx([3.0, 6.0])
    assert costs.seconds(2, 1) == pytest.approx([1.0, 1.1])


def test_a_cost_is_the_median_of_the_latest():
    costs = StepCosts(ROW_SIZES, 1)
    for seconds in (9.0, 9.0, 1.0, 1.0, 50.0, 1.0):
        costs.observe(3, 0, seconds)
    assert costs.seconds(4, 0) == [1.0]
    for _ in range(5):
        costs.observe(4, 0, 2.0)
    assert costs.seconds(3, 0) == [2.0]


def test_steps_between_two_lengths_are_not_measured():
    policy = DraftPolicy(costs := StepCosts(ROW_SIZES, 2))
    for _ in range(4):
        policy.observe(1, 0, 2, 1.0)
        policy.observe(1, 2, 0, 1.0)
        policy.observe(1, 0, 0, 1.0)
        policy.observe(1, 0, 0, 2.0)
        policy.pass_over()
        policy.observe(1, 0, 0, 1.0)
    assert costs.seconds(1, 0) == [2.0]
