"""Services that hang (SIGSTOP) for a while under load: what users see of it, and that all of it passes."""

import time

import pytest

from tests.support.load import ChatLoad

pytestmark = pytest.mark.processes


def test_another_engine_ends_what_one_that_hangs_had_begun(system):
    with ChatLoad(system.stack.url, 6) as load:
        load.wait_for_ok(6)
        with system.stopped("engine-2"):
            time.sleep(max(system.outage_s, 6))  # longer than its silence is borne
            load.wait_for_ok(6)
        system.wait_until_whole()
        load.wait_for_ok(6)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    assert all(len(texts) == 1 for texts in load.texts.values()), load.texts


def test_a_gateway_that_hangs_only_delays_what_came_to_it(system):
    with ChatLoad(system.stack.url, 6) as load:
        load.wait_for_ok(6)
        with system.stopped("gateway-2"):
            time.sleep(system.outage_s)
        load.wait_for_ok(6)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()


def test_chat_goes_on_while_a_registry_hangs(system):
    with ChatLoad(system.stack.url, 4) as load:
        load.wait_for_ok(4)
        with system.stopped("registry"):
            time.sleep(system.outage_s)
            load.wait_for_ok(4)
        load.wait_for_ok(4)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()


def test_a_trainer_that_hangs_goes_on_with_its_job_and_chat_with_its_answers(system):
    job_id = system.accept("paused", epochs=8)
    with ChatLoad(system.stack.url, 2) as load:
        system.wait_for_step(job_id, 2)
        with system.stopped("trainer"):
            time.sleep(system.outage_s)  # longer than its claim lasts
            load.wait_for_ok(4)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    system.succeeded(job_id)
    assert system.versions("paused") == [1]
