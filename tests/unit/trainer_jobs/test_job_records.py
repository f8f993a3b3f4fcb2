"""Histories and settings."""

import itertools
import json

import pytest
from pydantic import ValidationError

from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.records import downsample, submitted_fields, to_job
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


@pytest.mark.parametrize("kind", ["grpo", "opd"])
def test_a_job_remembers_who_drew_its_rollouts(kind):
    versions = ["kind@1", "kind@1", "base", "", "x" * 1000]
    group = trainer_pb2.GrpoGroup(
        rollouts=[trainer_pb2.GrpoRollout(adapter_version=version) for version in versions]
    )
    given = [trainer_pb2.OpdRollout(adapter_version=version) for version in versions]
    recipes = [
        {"grpo": trainer_pb2.GrpoSpec(groups=[group])},
        {"opd": trainer_pb2.OpdSpec(settings=trainer_pb2.OpdSettings(teacher="base"), rollouts=given)},
    ]
    request = trainer_pb2.SubmitRequest(**recipes[kind == "opd"])
    fields = {name.encode(): value for name, value in submitted_fields(request, "hash").items()}
    kept = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
    assert dict(to_job("job_1", kept, None, []).sampled_by) == {"kind@1": 2, "base": 1, "x" * 400: 1}
