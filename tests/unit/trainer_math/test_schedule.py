"""The learning rate over a job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln_trainer.recipes.options import OptimizerOptions
from kiln_trainer.torch_backend.schedule import learning_rate


def rates(num_steps: int, **options: object) -> list[float]:
    settings = OptimizerOptions(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, settings) for step in range(1, num_steps + 1)]


def test_constant_stays():
    assert rates(3) == [1.0, 1.0, 1.0]


def test_warm_up_rises_in_equal_parts_and_then_hands_over():
    assert rates(8, warmup_ratio=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_towards_zero_without_reaching_it():
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_passes_half_way_at_half():
    assert rates(4, schedule="cosine")[2] == pytest.approx(0.5)


@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from(["constant", "linear", "cosine"]))
def test_every_step_learns_and_none_more_than_asked(num_steps, warmup_ratio, schedule):
    assert all(0 < rate <= 1 for rate in rates(num_steps, warmup_ratio=warmup_ratio, schedule=schedule))
