"""Ctrl-C, SIGKILL and the next start on the same folder: what users see, and that nothing is left."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.stack import Stack, free_port, wait_for

pytestmark = pytest.mark.processes

PAIRS = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(1, 5)]


def _marked(state_dir: Path) -> dict[str, str]:
    """An environment by which a stack's processes are known; all of them inherit it."""
    return {**os.environ, "STACK_OF_A_TEST": str(state_dir)}


def _processes_of(state_dir: Path) -> list[int]:
    """Processes with this mark, and Redis, which overwrites it but works below the folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "environ").read_bytes() + os.readlink(os.fsencode(folder / "cwd"))
        except OSError:  # it ended meanwhile, or is not ours
            continue
        if os.fsencode(state_dir) in text:
            found.append(int(folder.name))
    return found


def _long_stream(stack: Stack) -> list[str]:
    """Data lines of a stream that does not end by itself for a while. Fails if it is cut off."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        return [line for line in response.iter_lines() if line.startswith("data:")]


def test_a_kill_loses_nothing_and_ctrl_c_cuts_nothing_off(tmp_path):
    stack = Stack(tmp_path / "state", env=_marked(tmp_path / "state")).start()
    job = {"adapter": "kept", "examples": PAIRS, "epochs": 1, "lora": {"rank": 4, "alpha": 8}}
    job_id = stack.post("/v1/train/sft", job).json()["id"]
    assert stack.wait_for_job(job_id)["status"] == "succeeded"

    # Nobody is left to stop the services: they end by themselves.
    assert len(_processes_of(stack.state_dir)) == 6
    stack.kill_supervisor()
    wait_for(lambda: _processes_of(stack.state_dir) == [] or None, "the services to end")
    stack.start()
    assert stack.get(f"/v1/train/jobs/{job_id}")["status"] == "succeeded"
    assert stack.chat("Hi", max_tokens=2).headers["X-Kiln-Adapter"] == "kept@1"

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(_long_stream, stack) for _ in range(3)]
        wait_for(lambda: stack.get("/v1/stats")["engine"]["running"] == 3, "three running streams")
        assert stack.stop() == 0
        for stream in streams:
            last = stream.result(30)[-1]
            assert last == "data: [DONE]" or '"gateway_stopping"' in last
    assert _processes_of(stack.state_dir) == []


def test_a_public_address_without_keys_is_refused_before_anything_starts(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KILN_")}
    command = [sys.executable, "-m", "kiln_cli", "up", "--host", "0.0.0.0", "--port", str(free_port())]
    command += ["--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 2
    assert "public_host_without_keys" in done.stderr
    assert "KILN_GATEWAY_API_KEYS" in done.stderr
    assert not (tmp_path / "state" / "pids").exists()


def test_ctrl_c_ends_the_demo_at_once_and_everything_it_started(tmp_path):
    state_dir = tmp_path / "demo"
    command = [sys.executable, "-m", "kiln_cli", "demo", "--state-dir", str(state_dir)]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        # A shell's background job ignores Ctrl-C, and so would whatever the tests of such a job start.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    with subprocess.Popen(command, env=_marked(state_dir), **options) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "learning, with chat traffic" in line:
                break
        assert len(_processes_of(state_dir)) == 6
        demo.send_signal(signal.SIGINT)
        rest, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in rest + errors
    assert "stopped before the end" in errors
    assert _processes_of(state_dir) == []
