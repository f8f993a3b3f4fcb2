"""Histories and settings."""

import itertools
import json

import pytest
from pydantic import ValidationError

from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.records import downsample
from kiln_trainer.settings import TrainerSettings


def step_event(step: int, loss: float) -> trainer_pb2.JobEvent:
    data = json.dumps({"step": step, "metrics": {"loss": loss}})
    return trainer_pb2.JobEvent(type="step", data_json=data)


def test_a_history_keeps_the_last_step_and_stays_small():
    events = [step_event(step, 1 / step) for step in range(1, 1002)]
    history = downsample(events, 200)
    assert 150 <= len(history) <= 200
    assert history[-1].step == 1001
    gaps = {b.step - a.step for a, b in itertools.pairwise(history)}
    assert len(gaps) == 1


def test_a_step_taken_again_counts_once_with_its_later_report():
    events = [
        step_event(1, 0.5),
        step_event(2, 0.4),
        step_event(2, 0.3),
        trainer_pb2.JobEvent(type="claimed"),
    ]
    assert [(point.step, point.metrics["loss"]) for point in downsample(events, 10)] == [(1, 0.5), (2, 0.3)]


def test_engine_addresses_are_separated_by_commas(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_TRAINER_ENGINE_ADDRESSES", "127.0.0.1:1, unix:/x")
    fields = {"redis_url": "unix:///r", "registry_address": "a:1", "state_dir": tmp_path}
    assert TrainerSettings(**fields).engine_addresses == ("127.0.0.1:1", "unix:/x")
    monkeypatch.setenv("KILN_TRAINER_ENGINE_ADDRESSES", " ")
    with pytest.raises(ValidationError):
        TrainerSettings(**fields)
