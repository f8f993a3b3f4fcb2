"""Clients that do not read, and a network that is cut between a gateway and its engine."""

import contextlib
import json
import socket
import sys
import time

import httpx
import pytest

from benchmarks.http.gateways import running_gateways
from kiln_cli.up.options import demo_model_dir
from tests.support.cuttable import CuttableProxy
from tests.support.load import ChatLoad
from tests.support.network import TwoHosts, why_no_namespaces
from tests.support.stack import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def _client_that_never_reads(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    fields = {"stream": True, "ignore_eos": True, "max_tokens": 6000}
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
    return client


def _num_running(system) -> int:
    return system.stack.get("/v1/stats")["engine"]["running"]


def test_clients_that_do_not_read_disturb_nobody_and_leave_nothing(system):
    slow = [_client_that_never_reads(system.stack.port) for _ in range(4)]
    try:
        wait_for(lambda: _num_running(system) >= 4, "four slow clients")
        with ChatLoad(system.stack.url, 2) as load:
            load.wait_for_ok(8)
        assert set(load.outcomes()) == {"ok"}, load.outcomes()
    finally:
        for client in slow:
            client.close()
    wait_for(lambda: _num_running(system) == 0, "their sequences to end")


def test_a_network_cut_ends_requests_clearly_and_heals(system, tmp_path):
    run_dir = system.run_dir
    proxy = CuttableProxy(run_dir / "cut.sock", run_dir / "engine.sock")
    environment = {
        "KILN_GATEWAY_MODEL_PATH": str(demo_model_dir()),
        "KILN_GATEWAY_ENGINE_ADDRESSES": f"unix:{run_dir}/cut.sock",
        "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{run_dir}/registry.sock",
        "KILN_GATEWAY_TRAINER_ADDRESSES": f"unix:{run_dir}/trainer.sock",
        "KILN_GATEWAY_ENGINE_SILENCE_S": "2",
    }
    try:
        with (
            running_gateways([environment], tmp_path) as [(url, _)],
            ChatLoad(url, 4) as load,
        ):
            load.wait_for_ok(4)
            proxy.cut()
            time.sleep(max(system.outage_s, 8))  # longer than the silence of an engine is borne
            proxy.heal()
            assert load.wait_for_ok(4) < 30
    finally:
        proxy.close()
        (run_dir / "cut.sock").unlink()
    lost = load.outcomes()
    del lost["ok"]
    assert set(lost) <= {"stream engine_unavailable", "503 engine_unavailable"}, lost
    assert lost  # it was cut
    # Nobody waits for an engine that is not there.
    assert load.longest_s < 15


@contextlib.contextmanager
def _gateway_and_engine_on_two_hosts(system, hosts, folder):
    """The gateway knows an engine behind the cable, and one of the system's; yields its socket."""
    engine_address = f"{hosts.ADDRESSES['right']}:8430"
    gateway_socket = folder / "gateway.sock"
    engine = {
        "KILN_ENGINE_MODEL_PATH": str(demo_model_dir()),
        "KILN_ENGINE_LISTEN": engine_address,
        "KILN_ENGINE_SOCKET_DIR": str(folder / "engine"),
    }
    gateway = {
        "KILN_GATEWAY_PORT": "0",
        "KILN_GATEWAY_SOCKET_PATH": str(gateway_socket),
        "KILN_GATEWAY_MODEL_PATH": str(demo_model_dir()),
        "KILN_GATEWAY_ENGINE_ADDRESSES": f"{engine_address},unix:{system.run_dir}/engine.sock",
        "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{system.run_dir}/registry.sock",
        "KILN_GATEWAY_TRAINER_ADDRESSES": f"unix:{system.run_dir}/trainer.sock",
        "KILN_GATEWAY_ENGINE_SILENCE_S": "2",
    }
    processes = [
        hosts.start("right", [sys.executable, "-m", "kiln_engine"], engine, folder / "engine.log"),
        hosts.start("left", [sys.executable, "-m", "kiln_gateway"], gateway, folder / "gateway.log"),
    ]
    try:
        wait_for(lambda: _states(gateway_socket) == ["ok", "ok"], f"both engines; logs in {folder}")
        yield gateway_socket
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def _health(gateway_socket):
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(gateway_socket)), timeout=10) as http:
        return http.get("http://localhost/health").json()


def _states(gateway_socket):
    try:
        return [engine["status"] for engine in _health(gateway_socket)["engines"]]
    except httpx.HTTPError:
        return []


@pytest.mark.skipif(bool(_REASON := why_no_namespaces()), reason=_REASON)
def test_a_cut_cable_pauses_answers_which_another_engine_ends(system, tmp_path):
    with (
        TwoHosts() as hosts,
        _gateway_and_engine_on_two_hosts(system, hosts, tmp_path) as gateway_socket,
        ChatLoad("http://localhost", 6, max_tokens=60, socket_path=gateway_socket) as load,
    ):
        load.wait_for_ok(18)
        hosts.cut()
        time.sleep(max(system.outage_s, 8))  # longer than the silence of an engine is borne
        assert _states(gateway_socket) == ["unavailable", "ok"]
        load.wait_for_ok(6)
        hosts.heal()
        wait_for(lambda: _states(gateway_socket) == ["ok", "ok"], "the engine behind the cable")
        drawn = _health(gateway_socket)["engines"][0]["scheduler"]["generated_tokens_total"]
        wait_for(
            lambda: _health(gateway_socket)["engines"][0]["scheduler"]["generated_tokens_total"] > drawn,
            "work for it",
        )
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    assert all(len(texts) == 1 for texts in load.texts.values()), load.texts
    assert "request_moved" in (tmp_path / "gateway.log").read_text()
    assert load.longest_s < 15
