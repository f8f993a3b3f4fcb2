"""Two engines behind two gateways: found, used, drained, killed, and both served by every job."""

import os
import signal

import grpc
import httpx
import pytest

from kiln_common.pb import engine_pb2, engine_pb2_grpc
from tests.support.chaos import ENGINES
from tests.support.load import ChatLoad
from tests.support.stack import wait_for
from tests.support.variants import patience

pytestmark = pytest.mark.processes
_MOVED = "kiln_gateway_requests_moved_total{"


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


def _num_moved(system):
    """Requests that another engine went on with, as both gateways count them."""
    total = 0.0
    for name in ("gateway", "gateway-2"):
        transport = httpx.HTTPTransport(uds=str(system.run_dir / f"{name}.sock"))
        with httpx.Client(transport=transport, timeout=30) as http:
            lines = http.get("http://localhost/metrics").text.splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith(_MOVED))
    return total


def _stats(system, engine):
    with grpc.insecure_channel(f"unix:{system.run_dir}/{engine}.sock") as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        return stub.GetStats(engine_pb2.GetStatsRequest(), timeout=10, wait_for_ready=True)


def _busy_engine(system):
    """One that has several answers under way."""

    def find():
        return next((name for name in ENGINES if _stats(system, name).num_running > 1), None)

    return wait_for(find, "an engine with work")


def _tell_to_stop_at_once(system, engine, pid):
    """The second signal is the one that hurries it."""
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: _stats(system, engine).is_draining, "the drain to begin")
    os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("is_killed", [False, True])
def test_answers_of_an_engine_that_goes_at_once_are_ended_by_the_other(system, stack, is_killed):
    """Told twice to stop, it hands back what runs; killed, it cannot. Clients see neither."""
    with ChatLoad(stack.url, 4, max_tokens=150 // patience()) as load:
        load.wait_for_ok(12)  # every question, undisturbed
        num_moved = _num_moved(system)
        engine = _busy_engine(system)
        pid = stack.pid(engine)
        if is_killed:
            stack.kill(engine)
        else:
            _tell_to_stop_at_once(system, engine, pid)
        stack.wait_for_restart(engine, pid)
        load.wait_for_ok(4)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    assert _num_moved(system) > num_moved
    # The same seed, the same text, whichever engines drew it.
    assert all(len(texts) == 1 for texts in load.texts.values()), load.texts


def test_a_gateway_that_is_stopped_finishes_what_it_has(stack):
    with ChatLoad(stack.url, 6) as load:
        load.wait_for_ok(6)
        pid = stack.pid("gateway-2")
        os.kill(pid, signal.SIGTERM)
        stack.wait_for_restart("gateway-2", pid)
        load.wait_for_ok(6)
    assert set(load.outcomes()) == {"ok"}, load.outcomes()


def test_a_gateway_that_is_killed_breaks_only_its_own_connections(stack):
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
