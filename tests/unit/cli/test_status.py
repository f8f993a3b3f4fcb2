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
