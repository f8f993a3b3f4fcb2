"""From the engine's load to training's share, in numbers alone."""

import pytest

from kiln_trainer.domain.gpu_share import (
    EngineLoad,
    Pressure,
    PressureGauge,
    Shares,
    pause_s,
    sm_count,
)

IDLE, ONE, MANY, QUEUED = EngineLoad(0, 0), EngineLoad(1, 0), EngineLoad(33, 0), EngineLoad(1, 1)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (IDLE, Pressure.IDLE),
        (ONE, Pressure.LIGHT),
        (EngineLoad(32, 0), Pressure.LIGHT),
        (MANY, Pressure.HEAVY),
        (QUEUED, Pressure.HEAVY),
        (EngineLoad(0, 1), Pressure.HEAVY),
    ],
)
def test_a_queue_or_a_large_batch_presses_hardest(load, expected):
    assert Pressure.of(load) is expected


def test_pressure_rises_at_once_and_falls_when_it_has_stayed_away():
    gauge = PressureGauge(calm_s=1.0)
    seen = [
        gauge.see(load, now_s)
        for now_s, load in [
            (0, IDLE),
            (0.1, QUEUED),
            (0.6, IDLE),
            (1.0, IDLE),
            (1.2, ONE),
            (2.1, IDLE),
            (2.3, IDLE),
        ]
    ]
    assert [level.name for level in seen] == ["IDLE", "HEAVY", "HEAVY", "HEAVY", "LIGHT", "LIGHT", "IDLE"]


def test_a_load_that_flickers_does_not_move_the_share():
    gauge = PressureGauge(calm_s=1.0)
    flicker = [gauge.see(QUEUED if number % 2 else ONE, 0.2 * number) for number in range(1, 50)]
    assert set(flicker) == {Pressure.HEAVY}


def test_an_engine_that_does_not_answer_counts_as_it_was_last():
    gauge = PressureGauge(calm_s=1.0)
    assert gauge.see(None, 0.0) is Pressure.LIGHT
    assert gauge.see(QUEUED, 5.0) is Pressure.HEAVY
    assert gauge.see(None, 50.0) is Pressure.HEAVY
    assert gauge.see(IDLE, 100.0) is Pressure.IDLE


@pytest.mark.parametrize(
    ("share", "num_sms", "expected"),
    [
        (32 / 132, 132, 32),
        (64 / 132, 132, 64),
        (96 / 132, 132, 96),
        (0.25, 132, 32),
        (0.5, 132, 64),
        (1.0, 132, 112),  # sixteen at least are the engine's
        (0.001, 132, 8),
        (0.5, 58, 32),
        (1.0, 58, 40),
        (1.0, 20, 8),
    ],
)
def test_partitions_come_in_eights_and_leave_some_to_the_engine(share, num_sms, expected):
    assert sm_count(share, num_sms) == expected


def test_a_pause_makes_work_its_share_of_the_time():
    assert pause_s(0.3, 1.0) == 0.0
    assert pause_s(0.3, 0.5) == pytest.approx(0.3)
    assert 0.3 / (0.3 + pause_s(0.3, 0.25)) == pytest.approx(0.25)


def test_shares_go_by_pressure():
    shares = Shares(idle=0.9, light=0.6, heavy=0.3)
    assert [shares.at(pressure) for pressure in Pressure] == [0.9, 0.6, 0.3]
