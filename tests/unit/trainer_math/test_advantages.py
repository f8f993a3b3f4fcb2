"""Advantages against values worked out by hand."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln_trainer.recipes.advantages import group_advantages, is_constant

rewards_groups = st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=8), min_size=1, max_size=5)


def test_group_scale_divides_by_each_groups_own_deviation():
    first, second = group_advantages([[0.0, 1.0], [0.0, 10.0]], "group")
    # Population deviations 0.5 and 5, each with 1e-4 added.
    assert first == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])
    assert second == pytest.approx([-5 / 5.0001, 5 / 5.0001])


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    first, second = group_advantages([[0.0, 2.0], [4.0, 6.0]], "batch")
    divisor = 5**0.5 + 1e-4  # of 0, 2, 4, 6
    assert first == pytest.approx([-1 / divisor, 1 / divisor])
    assert second == pytest.approx(first)


def test_no_scale_leaves_the_differences():
    assert group_advantages([[1.0, 2.0, 6.0]], "none") == [[-2.0, -1.0, 3.0]]


@given(rewards_groups, st.sampled_from(["group", "batch", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(groups, scale):
    for rewards, advantages in zip(groups, group_advantages(groups, scale), strict=True):
        size = max(map(abs, advantages), default=0.0)
        # Up to the rounding of the mean, which the division by a small deviation magnifies.
        assert abs(statistics.fmean(advantages)) <= 1e-9 * (1 + size) + 1e-8
        ranked = [advantage for _, advantage in sorted(zip(rewards, advantages, strict=True))]
        assert ranked == sorted(ranked)


def test_rewards_equal_up_to_rounding_count_as_constant():
    assert is_constant([0.1 + 0.2, 0.3])
    assert is_constant([1e6, 1e6 + 1e-4])
    assert not is_constant([0.3, 0.3001])
