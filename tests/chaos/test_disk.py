"""A full disk under a checkpoint and under the bytes of a version: the job waits or goes on."""

import time

import pytest

from tests.support.load import ChatLoad
from tests.support.stack import wait_for

pytestmark = pytest.mark.processes


def _log_has(system, service, event):
    return event in (system.stack.state_dir / "logs" / f"{service}.log").read_text()


def test_a_job_goes_on_without_checkpoints_it_cannot_write(system):
    # A checkpoint has 1.6 MB; the sealed memory in which the result travels is a file too, of 0.5 MB.
    with system.no_room_for_files("trainer", 1_000_000):
        job_id = system.accept("no-room", epochs=4)
        wait_for(lambda: _log_has(system, "trainer", "checkpoint_not_written"), "a refused checkpoint")
        system.wait_for_step(job_id, 4)
    system.succeeded(job_id)


def test_a_version_that_the_registrys_disk_has_no_room_for_is_published_later(system):
    with ChatLoad(system.stack.url, 2) as load:
        with system.no_room_for_files("registry"):
            job_id = system.accept("later", epochs=1)
            wait_for(lambda: _log_has(system, "registry", "registry_storage_full"), "a full registry")
            time.sleep(0.5)
            assert system.stack.get(f"/v1/train/jobs/{job_id}")["status"] == "running"
        system.succeeded(job_id)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    assert system.versions("later") == [1]


def test_a_registry_that_hangs_while_a_version_is_published_publishes_it_once(system):
    job_id = system.accept("hung", epochs=3)
    system.wait_for_step(job_id, 1)
    with system.stopped("registry"):
        time.sleep(system.outage_s)
    system.succeeded(job_id)
    assert system.versions("hung") == [1]
