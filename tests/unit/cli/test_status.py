"""What `kiln status` says about training."""

import io

import pytest
from rich.console import Console

from kiln_cli.status import show_status

IDLE, RUNNING = {"status": "idle"}, {"status": "running"}


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (None, "the trainer does not answer"),
        ({"running_job_id": None, "queued": 0, "trainers": [IDLE]}, "idle, 0 waiting"),
        ({"running_job_id": "job_1", "queued": 2, "trainers": [RUNNING]}, "runs job_1, 2 waiting"),
        (
            {"running_job_id": "job_1", "queued": 0, "trainers": [RUNNING, IDLE]},
            "1 of 2 trainers at work, 0 waiting",
        ),
    ],
)
def test_training_is_told_in_a_line(training, said):
    console = Console(file=io.StringIO(), width=120)
    health = {"status": "ok", "uptime_s": 5, "dependencies": {}, "training": training}
    show_status(console, "http://localhost", health)
    assert said in console.file.getvalue()


def test_each_engine_has_a_row_with_its_address_state_load_and_adapters():
    console = Console(file=io.StringIO(), width=160)
    scheduler = {
        "running": 2, "waiting": 1, "pages_in_use": 30, "pages_total": 120, "generated_tokens_total": 1234
    }  # fmt: skip
    known = {"device": "cpu", "dtype": "float32", "scheduler": scheduler}
    engines = [
        {
            **known,
            "id": "engine",
            "address": "10.0.0.1:8430",
            "status": "ok",
            "resident_adapters": ["x@1", "y@2"],
        },
        {**known, "id": "engine-2", "status": "draining", "resident_adapters": []},
        {"id": "engine-3", "address": "10.0.0.3:8430", "status": "unavailable"},
    ]
    health = {"status": "ok", "uptime_s": 5, "dependencies": {}, "training": None, "engines": engines}
    show_status(console, "http://localhost", health)
    rows = [line.split() for line in console.file.getvalue().splitlines()[-4:]]
    load = "cpu, float32 2 running, 1 waiting, 25 % of the cache 1,234"
    assert rows == [
        ["engine", "address", "state", "device", "load", "tokens", "written", "adapters", "in", "memory"],
        f"engine 10.0.0.1:8430 ok {load} x@1, y@2".split(),
        f"engine-2 – draining {load} none".split(),
        ["engine-3", "10.0.0.3:8430", "unavailable", "–", "–", "–", "–"],
    ]


def test_sockets_of_this_machine_need_no_column():
    console = Console(file=io.StringIO(), width=160)
    engines = [
        {"id": name, "address": f"unix:/run/{name}.sock", "status": "unavailable"}
        for name in ("engine", "engine-2")
    ]
    health = {"status": "ok", "uptime_s": 5, "dependencies": {}, "training": None, "engines": engines}
    show_status(console, "http://localhost", health)
    rows = [line.split() for line in console.file.getvalue().splitlines()[-3:]]
    assert rows[0] == ["engine", "state", "device", "load", "tokens", "written", "adapters", "in", "memory"]
    assert [row[:2] for row in rows[1:]] == [["engine", "unavailable"], ["engine-2", "unavailable"]]
