"""MPS under `kiln up`: started, found to work, stopped, and never in the way where it does not.

The control program is a script here and the driver a library made for tests; the supervisor, the
probe's process and everything between them are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from kiln_cli.errors import UnknownGpuSharing
from kiln_cli.up import gpu_sharing
from kiln_cli.up.gpu_sharing import SETTING, parse_choice, shared_gpu
from kiln_cli.up.mps import CONTROL, PIPE_VARIABLE, MpsServer, MpsUnavailable
from kiln_cli.up.specs import SharedFate, UpOptions, build_specs
from kiln_cli.up.supervisor import Supervisor
from kiln_common.settings import EXIT_DEVICE
from tests.support import fake_cuda
from tests.unit.cli.test_supervisor import _SERVICE, _console, _spec

_REPOSITORY = Path(__file__).resolve().parents[3]
# As the real one: -d and -f make a control socket, "quit" on standard input takes it away.
_CONTROL_SCRIPT = """#!/bin/sh
echo "$@" >>"$CUDA_MPS_LOG_DIRECTORY/calls"
if [ "$1" = "-d" ]; then
  [ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ] && { echo "An instance of this daemon is already running"; exit 1; }
  touch "$CUDA_MPS_PIPE_DIRECTORY/control"
elif [ "$1" = "-f" ]; then
  touch "$CUDA_MPS_PIPE_DIRECTORY/control"
  while [ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ]; do sleep 0.05; done
else
  read -r word
  [ "$word" = quit ] || exit 2
  rm "$CUDA_MPS_PIPE_DIRECTORY/control" || exit 1
fi
"""


@pytest.fixture(scope="module")
def driver_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    fake_cuda.compile_library(folder).rename(folder / "libcuda.so.1")
    return folder


@pytest.fixture
def gpu_host(tmp_path, monkeypatch, driver_dir):
    """A machine with a GPU and MPS, as far as anybody here can tell."""
    for name in (PIPE_VARIABLE, SETTING, "KILN_TRAINER_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / CONTROL).write_text(_CONTROL_SCRIPT)
    (tools / CONTROL).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver_dir))
    monkeypatch.setattr(gpu_sharing, "has_nvidia_gpu", lambda: True)
    return tmp_path


def share(folder: Path, choice="mps", device=None):
    return shared_gpu(choice, device, folder / "run", folder / "state")


@pytest.mark.parametrize("choice", ["auto", "mps"])
def test_mps_runs_for_as_long_as_it_is_needed(gpu_host, choice):
    control = gpu_host / "run" / "mps" / "control"
    with share(gpu_host, choice) as sharing:
        assert control.exists()
        assert sharing.env[PIPE_VARIABLE] == str(control.parent)
        assert sharing.env[SETTING] == "mps"
        assert sharing.note == "MPS runs: engine and trainer work at once"
        assert control.parent.stat().st_mode & 0o777 == 0o700
        sharing.renew()
        assert control.exists()
    assert not control.exists()


def test_a_server_that_outlived_its_supervisor_is_replaced(gpu_host):
    stale = gpu_host / "run" / "mps" / "control"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with share(gpu_host) as sharing:
        assert sharing.renew is not None
    assert not stale.exists()


def test_without_the_program_engine_and_trainer_take_turns(gpu_host, monkeypatch):
    (gpu_host / "bin" / CONTROL).unlink()
    with share(gpu_host, "mps") as sharing:
        assert sharing.note == (
            "no MPS, engine and trainer take turns on the GPU: nvidia-cuda-mps-control is not installed"
        )
        assert sharing.env[SETTING] == "time_slices"
        assert sharing.renew is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Cannot open the lock file'; exit 3", "ended with code 3: Cannot open the lock file"),
        ("exit 0", "its first client ended with code 1: the driver does not use the MPS server"),
    ],
)
def test_a_server_that_does_not_serve_is_told_in_a_line(gpu_host, script, said):
    (gpu_host / "bin" / CONTROL).write_text(f"#!/bin/sh\n{script}\n")
    with share(gpu_host) as sharing:
        assert sharing.note.endswith(said)
        assert sharing.env[SETTING] == "time_slices"


def test_a_driver_that_fails_under_mps_is_told_and_nothing_is_left_running(gpu_host, monkeypatch):
    monkeypatch.delenv("LD_LIBRARY_PATH")
    server = MpsServer(gpu_host / "pipe", gpu_host / "log")
    with pytest.raises(MpsUnavailable, match=r"libcuda\.so\.1 is not there|failed with"):
        server.start()
    assert not (gpu_host / "pipe" / "control").exists()


def test_a_program_that_hangs_is_given_up(gpu_host):
    (gpu_host / "bin" / CONTROL).write_text("#!/bin/sh\nexec sleep 30\n")
    server = MpsServer(gpu_host / "pipe", gpu_host / "log", command_timeout_s=0.2)
    with pytest.raises(MpsUnavailable, match="did not answer"):
        server.start()


def test_a_daemon_that_runs_but_answered_too_late_is_not_left_behind(gpu_host):
    script = _CONTROL_SCRIPT.replace(
        'touch "$CUDA_MPS_PIPE_DIRECTORY/control"\nelif',
        'touch "$CUDA_MPS_PIPE_DIRECTORY/control"\n  exec sleep 30\nelif',
    )
    assert script != _CONTROL_SCRIPT
    (gpu_host / "bin" / CONTROL).write_text(script)
    server = MpsServer(gpu_host / "pipe", gpu_host / "log", command_timeout_s=1.0)
    with pytest.raises(MpsUnavailable, match="did not answer"):
        server.start()
    assert (gpu_host / "log" / "calls").read_text().startswith("\n-d\n")
    assert not (gpu_host / "pipe" / "control").exists()


def test_time_slices_keep_clear_of_any_server(gpu_host):
    with share(gpu_host, "time_slices") as sharing:
        assert not Path(sharing.env[PIPE_VARIABLE]).exists()
        assert sharing.env[SETTING] == "time_slices"
    assert not (gpu_host / "run" / "mps").exists()


def test_an_operators_server_is_used_as_it_is(gpu_host, monkeypatch):
    monkeypatch.setenv(PIPE_VARIABLE, "/tmp/nvidia-mps")
    with share(gpu_host, "auto") as sharing:
        assert sharing.env == {SETTING: "auto"}
        assert "/tmp/nvidia-mps" in sharing.note


@pytest.mark.parametrize(
    ("choice", "note"),
    [("auto", ""), ("mps", "no MPS: the trainer has a GPU of its own (KILN_TRAINER_DEVICE=cuda:1)")],
)
def test_a_gpu_for_each_needs_no_mps_and_whoever_asked_for_it_is_told(gpu_host, monkeypatch, choice, note):
    monkeypatch.setenv("KILN_TRAINER_DEVICE", "cuda:1")
    with share(gpu_host, choice) as sharing:
        assert (sharing.env, sharing.note) == ({}, note)
    assert not (gpu_host / "run" / "mps").exists()


@pytest.mark.parametrize(("choice", "note"), [("auto", ""), ("mps", "mps needs a GPU"), ("time_slices", "")])
def test_a_cpu_is_left_alone(gpu_host, choice, note):
    with share(gpu_host, choice, device="cpu") as sharing:
        assert (sharing.env, sharing.note) == ({}, note)


def test_the_option_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv(SETTING, "mps")
    assert parse_choice(None) == "mps"
    assert parse_choice("time_slices") == "time_slices"
    monkeypatch.delenv(SETTING)
    assert parse_choice(None) == "auto"
    with pytest.raises(UnknownGpuSharing, match="'half'"):
        parse_choice("half")


def test_engine_and_trainer_and_nobody_else_are_clients(tmp_path):
    options = UpOptions("m", False, "127.0.0.1", 1, tmp_path, tmp_path, gpu_env={PIPE_VARIABLE: "/pipe"})
    clients = {spec.name for spec in build_specs(options) if spec.env.get(PIPE_VARIABLE) == "/pipe"}
    assert clients == {"engine", "trainer"}


async def run_until_fault(tmp_path, renew, end=f"os._exit({EXIT_DEVICE})"):
    """Engine, trainer and gateway; the trainer does `end` when told. Returns what was printed."""
    console, out = _console(tmp_path)
    faulty = _SERVICE.replace("stop.wait()", f"stop.wait(); {end}")
    specs = [
        _spec(tmp_path / "engine"),
        _spec(tmp_path / "trainer", "trainer", faulty),
        _spec(tmp_path / "gateway", "gateway"),
    ]
    fate = SharedFate(frozenset({"engine", "trainer"}), renew)
    supervisor = Supervisor(specs, tmp_path, console, shared_fate=fate)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.wait_until_ready(), 60)
    before = {name: process.pid for name, process in supervisor.processes.items()}
    for name in before:
        (tmp_path / name / "ready").unlink()
    os.kill(before["trainer"], signal.SIGTERM)
    return supervisor, running, before, out


async def test_a_fault_of_the_gpu_starts_everything_that_shared_it_again(tmp_path):
    renewals = []

    def renew():
        # Nothing that shared the GPU runs any more, and nothing has been started again.
        pids = [tmp_path / "pids" / f"{name}.pid" for name in ("engine", "trainer")]
        renewals.append([path.exists() for path in pids])

    supervisor, running, before, out = await run_until_fault(tmp_path, renew)
    shared = [supervisor.processes[name] for name in ("engine", "trainer")]
    async with asyncio.timeout(60):
        while not all(
            process.is_ready.is_set() and process.pid != before[process.spec.name] for process in shared
        ):
            await asyncio.sleep(0.02)
    assert renewals == [[False, False]]
    assert supervisor.processes["gateway"].pid == before["gateway"]
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    assert "a fault on the GPU ended what shared it: engine and trainer start again" in out.getvalue()


async def test_mps_that_does_not_come_back_does_not_keep_the_services_away(tmp_path):
    def renew():
        raise MpsUnavailable("the server is gone")

    supervisor, running, before, out = await run_until_fault(tmp_path, renew)
    engine = supervisor.processes["engine"]
    async with asyncio.timeout(60):
        while engine.pid == before["engine"] or not engine.is_ready.is_set():
            await asyncio.sleep(0.02)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    assert "MPS did not come back, engine and trainer take turns: the server is gone" in out.getvalue()


@pytest.mark.parametrize("end", ["os._exit(1)", "os.abort()"])
async def test_a_service_that_ends_for_another_reason_leaves_the_others_alone(tmp_path, end):
    supervisor, running, before, _ = await run_until_fault(tmp_path, lambda: pytest.fail("renewed"), end)
    trainer = supervisor.processes["trainer"]
    async with asyncio.timeout(60):
        while trainer.pid == before["trainer"] or not trainer.is_ready.is_set():
            await asyncio.sleep(0.02)
    assert supervisor.processes["engine"].pid == before["engine"]
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0


async def test_a_stop_during_the_renewal_stops_everything(tmp_path):
    has_begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    supervisor, running, _, _ = await run_until_fault(
        tmp_path, lambda: loop.call_soon_threadsafe(has_begun.set)
    )
    await asyncio.wait_for(has_begun.wait(), 60)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    assert not list((tmp_path / "pids").iterdir())


def run_container_script(gpu_host, until):
    """deploy/docker/mps.sh until that line, then a stop; everything it printed."""
    env = {**os.environ, PIPE_VARIABLE: str(gpu_host / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(gpu_host)}
    script = subprocess.Popen(
        ["sh", str(_REPOSITORY / "deploy" / "docker" / "mps.sh")],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert script.stdout is not None
    line = script.stdout.readline()
    has_server, has_decided = (gpu_host / "pipe" / "control").exists(), (gpu_host / "pipe-decided").exists()
    script.terminate()
    assert script.wait(60) == 0
    script.stdout.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(script.pid, signal.SIGKILL)  # in a container they end with the script
    assert until in line
    assert has_decided
    return has_server


def test_the_container_runs_mps_until_it_is_stopped(gpu_host):
    assert run_container_script(gpu_host, "MPS runs")
    assert not (gpu_host / "pipe" / "control").exists()


def test_the_container_stays_without_mps_and_says_why(gpu_host):
    (gpu_host / "bin" / CONTROL).unlink()
    assert not run_container_script(gpu_host, "nvidia-cuda-mps-control is not installed")
