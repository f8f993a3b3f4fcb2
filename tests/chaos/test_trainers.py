"""Two trainers and one job; and clocks that jump while a job runs."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tests.support.load import ChatLoad
from tests.support.stack import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@contextlib.contextmanager
def _second_trainer(system):
    """A trainer beside the stack's, for the same engine, queue and checkpoints."""
    state_dir = system.stack.state_dir
    environment = {
        **system.env,
        "KILN_TRAINER_LISTEN": f"unix:{system.run_dir}/trainer-2.sock",
        "KILN_TRAINER_STATE_DIR": str(state_dir / "trainer"),
        "KILN_TRAINER_REDIS_URL": system.redis.url,
        "KILN_TRAINER_REGISTRY_ADDRESS": f"unix:{system.run_dir}/registry.sock",
        "KILN_TRAINER_ENGINE_ADDRESSES": f"unix:{system.run_dir}/engine.sock",
    }
    log = state_dir / "logs" / "trainer-2.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kiln_trainer"],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "trainer_ready" in log.read_text(), "the second trainer")
        yield process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert process.wait(60) == 0


def test_a_job_whose_trainer_hangs_is_carried_on_by_another_and_ends_once(system):
    with _second_trainer(system) as second_pid:
        job_id = system.accept("handed-on", epochs=12)
        system.wait_for_step(job_id, 2)
        is_first = system.stack.get("/v1/train/status")["running_job_id"] == job_id
        claimant = system.stack.pid("trainer") if is_first else second_pid
        os.kill(claimant, signal.SIGSTOP)
        try:
            wait_for(lambda: system.num_claims(job_id) >= 2, "a second claim")
        finally:
            os.kill(claimant, signal.SIGCONT)
        job = system.succeeded(job_id)
    assert job["attempts"] >= 2
    assert [step["step"] for step in job["history"]] == list(range(1, len(job["history"]) + 1))
    assert system.versions("handed-on") == [1]


@pytest.mark.parametrize("jump_s", [-3600, 30 * 24 * 3600])
def test_a_clock_that_jumps_while_a_job_runs_loses_nothing(system, jump_s):
    adapter = f"jump{jump_s}".replace("-", "back")
    job_id = system.accept(adapter, epochs=6)
    system.wait_for_step(job_id, 1)
    with ChatLoad(system.stack.url, 2) as load:
        load.wait_for_ok(2)
        system.shift_clocks(jump_s)
        try:
            load.wait_for_ok(4)
            system.succeeded(job_id)
            waiting_id = system.accept(adapter, epochs=1)
            system.succeeded(waiting_id)
        finally:
            system.shift_clocks(0)
        load.wait_for_ok(2)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    assert system.versions(adapter) == [1, 2]
