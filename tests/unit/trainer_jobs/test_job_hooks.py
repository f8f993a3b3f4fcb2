"""What a job reports at its steps."""

import json

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
    now_s = iter([50.0, 52.0, 55.0])  # the beginning and the ends of two steps
    hooks = JobHooks(job, publish=lambda trained: None, totals=TrainerTotals(), clock=lambda: next(now_s))
    for num_tokens in (100.0, 300.0):
        hooks.after_step(StepReport(1, 2, 0, {"loss": 1.0, "tokens": num_tokens}))
    assert [written["tokens_per_s"] for written in job.written] == [50.0, 100.0]


def test_a_report_without_tokens_has_no_rate():
    job = WrittenJob()
    JobHooks(job, publish=lambda trained: None, totals=TrainerTotals()).after_step(
        StepReport(1, 1, 0, {"loss": 1.0})
    )
    assert job.written == [{"loss": 1.0}]
