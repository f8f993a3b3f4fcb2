"""Redis gone for a while, and full: chat goes on, nothing accepted is lost, refusals are clear."""

import time

import pytest

from tests.support.load import ChatLoad
from tests.support.stack import wait_for

pytestmark = pytest.mark.processes


def test_redis_away_for_a_while_costs_no_answer_and_no_job(system):
    job_ids = [system.accept(f"outlived-{number}", epochs=4) for number in range(2)]
    system.wait_for_step(job_ids[0], 1)
    with ChatLoad(system.stack.url, 4) as load:
        load.wait_for_ok(4)
        system.redis.kill()
        time.sleep(system.outage_s)
        refused = system.submit("refused")
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] in ("queue_unavailable", "trainer_unavailable")
        load.wait_for_ok(4)
        system.redis.start()
        system.wait_until_whole()
        load.wait_for_ok(4)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    for job_id in job_ids:
        system.succeeded(job_id)


def test_a_full_redis_refuses_jobs_by_name_and_serves_chat(system):
    job_id = system.accept("before-full", epochs=6)
    system.wait_for_step(job_id, 1)
    with system.full_redis(), ChatLoad(system.stack.url, 4) as load:
        # Enough that words and rollouts have given way, and nothing else may.
        time.sleep(system.outage_s)
        refused = system.submit("refused")
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "queue_unavailable"
        load.wait_for_ok(4)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    system.succeeded(job_id)
    response = wait_for(lambda: (r := system.submit("after-full", 1)).status_code == 202 and r, "a job")
    system.succeeded(response.json()["id"])
