"""Loop, scheduler and speculator together: what they make of given step times and a given acceptance."""

from __future__ import annotations

from functools import cache

import pytest

from tests.support.speculating_engine import DeviceTimes, Speculation, speculate

MAX_DRAFTS = 3
# By batch: about what an H200 takes with Qwen3.5-4B, now and before verification had its own kernels.
TIMES = {
    1: DeviceTimes(2.66, 2.95, 3.05, draft=0.19, host=0.6),
    16: DeviceTimes(3.10, 3.50, 3.95, draft=0.22, host=0.7),
    64: DeviceTimes(4.30, 6.10, 7.60, draft=0.35, host=0.9),
    256: DeviceTimes(9.80, 16.0, 26.0, draft=1.0, host=1.5),
}
DEAR_TIMES = {
    1: DeviceTimes(2.66, 3.90, 4.00, draft=0.20, host=0.85),
    16: DeviceTimes(3.10, 4.90, 5.60, draft=0.30, host=0.9),
    64: DeviceTimes(4.30, 14.5, 15.7, draft=0.40, host=1.0),
}
# As measured on an H200: steps of three drafts take 5.5 ms at 16 rows and 11.75 at 64.
MEASURED_TIMES = {
    16: DeviceTimes(3.06, 4.10, 4.60, draft=0.3, host=0.8),
    64: DeviceTimes(4.26, 7.50, 10.4, draft=0.45, host=1.3),
}
# By when all requests have begun, and by when lengths have been looked at.
BEGUN_S, SETTLED_S = 0.2, 1.2
SECONDS = {1: 9.0, 16: 4.0, 64: 2.5, 256: 3.0}


@cache
def fixed(num_rows: int, acceptance: float, num_drafts: int, *, is_dear: bool = False) -> Speculation:
    """Always so many drafts."""
    return speculate(
        times(num_rows, is_dear=is_dear),
        num_rows,
        acceptance,
        seconds=SECONDS[num_rows],
        max_drafts=num_drafts,
        is_adaptive=False,
    )


def times(num_rows: int, *, is_dear: bool) -> DeviceTimes:
    return (DEAR_TIMES if is_dear else TIMES)[num_rows]


def adaptive(
    num_rows: int, acceptance, *, is_dear: bool = False, seconds: float | None = None
) -> Speculation:
    found = times(num_rows, is_dear=is_dear)
    return speculate(found, num_rows, acceptance, seconds=seconds or SECONDS[num_rows])


@pytest.mark.parametrize(
    ("num_rows", "acceptance", "is_dear"),
    [
        (1, 0.3, False),
        (1, 0.7, False),
        (16, 0.7, False),
        (64, 0.7, False),
        (1, 0.7, True),
        (16, 0.7, True),
    ],
)
def test_the_speed_is_close_to_that_of_the_best_length(num_rows, acceptance, is_dear):
    fixed_ones = [fixed(num_rows, acceptance, length, is_dear=is_dear) for length in (1, MAX_DRAFTS)]
    done = adaptive(num_rows, acceptance, is_dear=is_dear)
    # From the start, first looks included, and when these are over.
    for begin_s, share in ((BEGUN_S, 0.93), (SETTLED_S, 0.95)):
        assert done.speed(begin_s) > share * max(each.speed(begin_s) for each in fixed_ones)


@pytest.mark.parametrize(
    ("num_rows", "acceptance", "is_dear"),
    [
        (1, 0.0, False),
        (16, 0.0, False),
        (64, 0.3, False),
        (256, 0.7, False),
        (16, 0.3, True),
        (64, 0.7, True),
    ],
)
def test_where_plain_decoding_is_best_next_to_nothing_is_lost(num_rows, acceptance, is_dear):
    plain = fixed(num_rows, 0.0, 0, is_dear=is_dear)
    done = adaptive(num_rows, acceptance, is_dear=is_dear)
    assert done.speed(SETTLED_S) > 0.98 * plain.speed(SETTLED_S)
    assert done.share(0, SETTLED_S) > 0.98


@pytest.mark.parametrize(
    ("num_rows", "answer_tokens", "seconds", "share_of_best"),
    [(16, 1024, 6.0, 0.985), (64, 512, 5.0, 0.985)],
)
def test_answers_that_all_come_at_once_lose_little_by_looks(num_rows, answer_tokens, seconds, share_of_best):
    """As `benchmarks.engine.speculation` has them: a wave to get to know the steps, then one that counts."""
    measured = MEASURED_TIMES[num_rows]
    speeds = []
    for options in ({}, {"is_adaptive": False}, {"max_drafts": 0}):
        done = speculate(
            measured, num_rows, 0.7, seconds=seconds, answer_tokens=answer_tokens, is_in_waves=True, **options
        )
        speeds.append(done.speed(*done.waves[1]))
    own, *fixed_ones = speeds
    assert own > share_of_best * max(fixed_ones)


def test_lengths_follow_an_acceptance_that_changes():
    def acceptance(time_s: float) -> float:
        return 0.0 if 2.0 <= time_s < 5.0 else 0.8

    done = adaptive(1, acceptance, seconds=8.0)
    plain, best = (fixed(1, 0.8, length).speed(SETTLED_S) for length in (0, MAX_DRAFTS))
    assert done.speed(SETTLED_S, 2.0) > 0.96 * best
    assert done.speed(2.0, 3.0) > 0.88 * plain
    assert done.speed(4.0, 5.0) > 0.97 * plain
    assert done.speed(6.5, 8.0) > 0.93 * best


@pytest.mark.parametrize(("num_rows", "seconds"), [(1, 3.0), (16, 4.0), (64, 3.0)])
def test_drafts_come_back_where_they_have_not_paid_for_long(num_rows, seconds):
    """Looks are rare by then, and yet the next one is never more than so many steps away."""
    found = times(num_rows, is_dear=False)
    done = speculate(found, num_rows, lambda now_s: 0.9 * (now_s >= 6.0), seconds=7.5 + seconds)
    best = speculate(found, num_rows, 0.9, seconds=3.0, is_adaptive=False).speed(SETTLED_S)
    assert done.speed(6.0 + seconds, 7.5 + seconds) > 0.93 * best


@pytest.mark.parametrize("num_rows", [5, 18])
def test_short_answers_have_drafts_too(num_rows):
    """Their number changes from step to step, and with it which graph they have."""
    speeds = [
        speculate(TIMES[16], num_rows, 0.7, seconds=5.0, answer_tokens=16, is_adaptive=is_adaptive).speed(1.0)
        for is_adaptive in (True, False)
    ]
    assert speeds[0] > 0.84 * speeds[1]


def test_the_same_engine_does_the_same_again():
    assert adaptive(1, 0.5, seconds=1.0).steps == adaptive(1, 0.5, seconds=1.0).steps
