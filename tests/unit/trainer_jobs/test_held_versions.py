"""Which adapter versions jobs that have not ended wait on, and how the registry hears of it."""

import pytest

from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.held_versions import HeldVersions, versions_needed


def job(resolved="", teacher="", **config):
    return trainer_pb2.Job(
        config=trainer_pb2.JobConfig(adapter="mine", **config),
        resolved_base_adapter=resolved,
        opd_settings=trainer_pb2.OpdSettings(teacher=teacher),
    )


@pytest.mark.parametrize(
    ("waiting", "needed"),
    [
        (job(), ["mine"]),
        (job(start_fresh=True), []),
        (job(base_adapter="other@3"), ["other@3"]),
        (job(resolved="mine@2"), ["mine@2"]),
        (job(start_fresh=True, teacher="tutor@4"), ["tutor@4"]),
        (job(start_fresh=True, teacher="base"), []),
    ],
)
def test_a_job_needs_what_it_starts_from_and_its_teacher(waiting, needed):
    assert versions_needed(waiting) == needed


class Jobs:
    def __init__(self, *jobs) -> None:
        self.jobs = [*jobs]

    def list_open(self):
        return self.jobs


class Registry:
    def __init__(self) -> None:
        self.held = []
        self.is_up = True

    async def hold(self, holder, references, *, for_s):
        if not self.is_up:
            raise RegistryUnavailable("away")
        self.held.append((holder, [*references]))


async def test_the_queue_is_reported_until_nothing_waits():
    jobs, registry = Jobs(job(), job(base_adapter="other@3"), job(base_adapter="other@3")), Registry()
    held = HeldVersions(jobs, registry)
    await held.report()
    registry.is_up = False
    await held.report()  # an outage ends nothing
    registry.is_up = True
    jobs.jobs = []
    await held.report()
    await held.report()
    assert registry.held == [("trainers", ["mine", "other@3"]), ("trainers", [])]
