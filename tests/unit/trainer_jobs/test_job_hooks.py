"""What a job reports at its steps."""

import json
import time

from kiln_trainer.domain.training import StepReport
from kiln_trainer.jobs.hooks import JobHooks
from kiln_trainer.jobs.totals import TrainerTotals


class WrittenJob:
    def __init__(self):
        self.written = []

    def write(self, fields, event):
        self.written.append(json.loads(fields["metrics"]))


def test_tokens_a_second_are_those_of_the_step_by_its_own_time():
    job = WrittenJob()
    hooks = JobHooks(job, publish=lambda trained: None, totals=TrainerTotals())
    for num_tokens in (100.0, 300.0):
        began_s = time.monotonic()
        while time.monotonic() - began_s < 0.02:
            pass  # the step's work
        hooks.after_step(StepReport(1, 2, 0, {"loss": 1.0, "tokens": num_tokens}))
    first, second = (written["tokens_per_s"] for written in job.written)
    assert 0 < first <= 100 / 0.02
    assert first < second <= 300 / 0.02


def test_a_report_without_tokens_has_no_rate():
    job = WrittenJob()
    JobHooks(job, publish=lambda trained: None, totals=TrainerTotals()).after_step(
        StepReport(1, 1, 0, {"loss": 1.0})
    )
    assert job.written == [{"loss": 1.0}]
