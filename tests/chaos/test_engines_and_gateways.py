"""Two engines behind two gateways: found, used, drained, killed, and both served by every job."""

import os
import signal
import time

import pytest

from tests.support.load import ChatLoad

pytestmark = pytest.mark.processes


@pytest.fixture
def stack(system):
    return system.stack


def _engines(stack):
    return stack.get("/health")["engines"]


def test_every_gateway_uses_both_engines(stack):
    with ChatLoad(stack.url, 8) as load:
        load.wait_for_ok(30)
    assert set(load.outcomes()) == {"ok"}
    assert all(engine["scheduler"]["generated_tokens_total"] > 50 for engine in _engines(stack))


def test_a_job_has_succeeded_when_both_engines_serve_its_version(stack):
    body = {
        "adapter": "both",
        "examples": [{"prompt": "What is 1 + 1?", "completion": "It is 2."}],
        "lora": {"rank": 4, "alpha": 8},
    }
    response = stack.post("/v1/train/sft", body)
    assert response.status_code == 202, response.text
    job = stack.wait_for_job(response.json()["id"])
    assert job["status"] == "succeeded", job
    assert job["result"].get("not_live", []) == []
    assert all("both@1" in engine["resident_adapters"] for engine in _engines(stack))


def test_an_engine_that_is_stopped_and_started_under_load_fails_no_request(system, stack):
    service = "engine"  # the one whose weights the trainer maps
    with ChatLoad(stack.url, 6) as load:
        load.wait_for_ok(6)
        pid = stack.pid(service)
        os.kill(pid, signal.SIGTERM)
        stack.wait_for_restart(service, pid)
        load.wait_for_ok(6)
        system.wait_until_whole()
        load.wait_for_ok(6)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()


def test_an_engine_that_is_killed_costs_only_the_answers_it_had_begun(system, stack):
    with ChatLoad(stack.url, 6) as load:
        load.wait_for_ok(6)
        dead = stack.kill("engine-2")
        assert load.wait_for_ok(6) < 20
        stack.wait_for_restart("engine-2", dead)
        system.wait_until_whole()
        load.wait_for_ok(6)
    lost = load.outcomes()
    del lost["ok"]
    assert set(lost) <= {"stream engine_unavailable", "503 engine_unavailable"}, lost
    assert sum(lost.values()) <= 6  # at most what each client was waiting for


def test_a_gateway_that_is_stopped_finishes_what_it_has(stack):
    with ChatLoad(stack.url, 6) as load:
        load.wait_for_ok(6)
        pid = stack.pid("gateway-2")
        os.kill(pid, signal.SIGTERM)
        stack.wait_for_restart("gateway-2", pid)
        load.wait_for_ok(6)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()


def test_a_gateway_that_is_killed_breaks_only_its_own_connections(stack):
    began_s = time.monotonic()
    with ChatLoad(stack.url, 6) as load:
        load.wait_for_ok(6)
        dead = stack.kill("gateway-2")
        load.wait_for_ok(6)
        stack.wait_for_restart("gateway-2", dead)
        load.wait_for_ok(6)
    lost = load.outcomes()
    del lost["ok"]
    assert set(lost) <= {"RemoteProtocolError", "ReadError", "ConnectError"}, lost
    assert sum(lost.values()) <= 6
    assert time.monotonic() - began_s < 60
