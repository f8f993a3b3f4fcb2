"""When a demonstration counts as learned, and how it is shown."""

import pytest

from benchmarks.reward_seeds import has_learned, row


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def result(after: float, control: float) -> dict[str, object]:
    return {
        "reward_before": interval(0.4),
        "reward_after": interval(after),
        "control_after": interval(control),
        "rounds": 16,
        "requests_failed": 0,
        "requests_total": 100,
    }


@pytest.mark.parametrize(
    ("after", "control", "learned"),
    [(0.8, 0.42, True), (0.8, 0.1, True), (0.45, 0.4, False), (0.3, 0.4, False), (0.8, 0.7, False)],
)
def test_the_adapter_rises_clear_of_the_base_model_and_the_control_does_not(after, control, learned):
    assert has_learned(result(after, control)) is learned


def test_a_row_has_means_with_their_intervals():
    assert row(2, result(0.8, 0.42)) == (
        "| 2 | 0.400 (0.350 to 0.450) | 0.800 (0.750 to 0.850) | 0.420 (0.370 to 0.470) | 16 | 0 of 100 |"
    )
