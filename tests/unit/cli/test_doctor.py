"""`kiln doctor`: what each check makes of what it finds."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import kiln
from kiln_cli.doctor import device, machine, services
from kiln_cli.doctor.check import Check, Finding, State, ok, overall, run_checks, summary
from kiln_cli.up.options import run_dir_of
from tests.support.command import Command


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on():
    def breaks():
        raise RuntimeError("out of order")

    shown = []
    found = run_checks(
        [Check("first", breaks), Check("second", lambda: ok("fine"))],
        lambda name, finding: shown.append((name, finding.state)),
    )
    assert [entry["state"] for entry in found] == ["failed", "ok"]
    assert found[0]["detail"] == "RuntimeError: out of order"
    assert shown == [("first", State.FAILED), ("second", State.OK)]


@pytest.mark.parametrize(
    ("gateway", "disk", "said"),
    [
        ("ok", "ok", "all is well"),
        ("skipped", "ok", "this machine is fine, and no server answers; kiln up starts one"),
        ("ok", "warning", "works, and could be better: disk"),
        ("failed", "warning", "not well: gateway"),
    ],
)
def test_the_last_line_says_what_it_comes_to(gateway, disk, said):
    assert summary([{"name": "disk", "state": disk}, {"name": "gateway", "state": gateway}]) == said


@pytest.mark.parametrize(
    ("states", "is_strict", "expected"),
    [
        (["ok", "skipped"], True, State.OK),
        (["ok", "warning"], False, State.WARNING),
        (["ok", "warning"], True, State.FAILED),
        (["warning", "failed"], False, State.FAILED),
    ],
)
def test_the_worst_finding_counts_and_strict_takes_warnings_for_failures(states, is_strict, expected):
    assert overall([{"state": State(state)} for state in states], is_strict) is expected


def test_a_port_is_free_or_kilns_or_somebody_elses(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
    assert machine.port(number) == ok(f"{number} is free")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if is_kiln:
                self.send_header("X-Request-Id", "req_1")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", number), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        is_kiln = True
        assert machine.port(number).detail == f"{number} is served by a Kiln"
        is_kiln = False
        found = machine.port(number)
        server.shutdown()
    assert found.state is State.FAILED
    assert found.hint.endswith(f"kiln up --port {number + 1}.")


def fake_driver(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: True)


def test_the_driver_says_what_gpu_there_is(tmp_path, monkeypatch):
    fake_driver(tmp_path, monkeypatch, "echo 'NVIDIA H200, 580.1, 143771 MiB, 9.0'")
    assert machine.gpu() == ok("NVIDIA H200, 143771 MiB, driver 580.1, compute 9.0")
    fake_driver(tmp_path, monkeypatch, "echo 'Tesla T4, 550.2, 15360 MiB, 7.5'")
    assert machine.gpu().state is State.WARNING
    fake_driver(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert (machine.gpu().state, "NVIDIA-SMI has failed" in machine.gpu().detail) == (State.FAILED, True)


def test_a_gpu_needs_a_compiler_and_a_build_for_it(monkeypatch):
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert machine.compiler().state is State.FAILED
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert machine.compiler() == ok("/usr/bin/cc")
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert "cannot use this machine's GPU" in machine.packages().detail


def test_little_room_is_a_warning_and_none_a_failure(tmp_path, monkeypatch):
    usage = machine.shutil.disk_usage(tmp_path)
    for free, state in ((2**40, State.OK), (2 * 2**30, State.WARNING), (2**20, State.FAILED)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        assert machine.disk(tmp_path / "not" / "yet").state is state
    for free, state in ((2**40, State.OK), (2**20, State.WARNING), (None, State.SKIPPED)):
        monkeypatch.setattr(machine, "_available_memory_bytes", lambda free=free: free)
        assert machine.memory().state is state


def test_what_does_not_run_is_skipped_and_what_hangs_is_a_failure(tmp_path):
    assert services.service("engine", tmp_path).state is State.SKIPPED
    assert services.redis(tmp_path, may_start=False).state is State.SKIPPED
    run_dir = run_dir_of(tmp_path)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("engine", "redis"):
        (run_dir / f"{name}.sock").touch()
    assert services.names_of("engine", tmp_path) == ["engine"]
    (run_dir / "engine-2.sock").touch()
    assert services.names_of("engine", tmp_path) == ["engine", "engine-2"]
    engine = services.service("engine-2", tmp_path)
    assert (engine.state, "kiln logs engine-2" in engine.hint) == (State.FAILED, True)
    assert services.redis(tmp_path, may_start=False).state is State.FAILED


def test_a_redis_is_started_for_the_moment_and_a_configured_one_asked(tmp_path, monkeypatch):
    found = services.redis(tmp_path, may_start=True)
    assert found.state is State.OK
    assert "started and stopped" in found.detail
    monkeypatch.setenv("KILN_REDIS_URL", "redis://127.0.0.1:9/0")
    assert services.redis(tmp_path, may_start=True).state is State.FAILED


def test_a_server_that_is_not_there_is_not_a_fault():
    assert services.gateway(kiln.Client("http://127.0.0.1:9")).state is State.SKIPPED


def test_a_self_test_that_dies_says_its_last_line(tmp_path, monkeypatch):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho Traceback >&2\necho 'RuntimeError: no device' >&2\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(device.sys, "executable", str(interpreter))
    assert device.kernel() == Finding(
        State.FAILED,
        "RuntimeError: no device",
        "Update the driver; KILN_KERNELS=reference does without kernels.",
    )
    interpreter.write_text("""#!/bin/sh\necho '{"is_ok": false, "detail": "relative error 0.3"}'\n""")
    assert device.kernel().detail == "relative error 0.3"


def test_a_failure_decides_the_exit_code(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpu", lambda: Finding(State.FAILED, "gone", "Put it back."))
    arguments = ("doctor", "--state-dir", str(tmp_path), "--url", "http://127.0.0.1:9")
    ran = Command(capsys)(*arguments, "--json")
    assert (ran.exit_code, ran.json["state"], ran.json["schema_version"]) == (1, "failed", 1)
    ran = Command(capsys)(*arguments)
    assert "✗ gpu             gone" in ran.out
    assert "Put it back." in ran.out
