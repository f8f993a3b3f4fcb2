"""The supervisor with small real processes in place of the services."""

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from kiln_cli.errors import (
    NotEnoughGpus,
    PortInUse,
    PublicHostWithoutKeys,
    StateDirInUse,
    StateDirUnusable,
    TooManyTrainers,
)
from kiln_cli.up.console import UpConsole, how_it_ended
from kiln_cli.up.gpus import assign_gpus, choose_num_trainers
from kiln_cli.up.options import (
    build_options,
    check_host,
    check_port,
    make_run_dir,
    overruled_variables,
    reachable_url,
)
from kiln_cli.up.specs import ServiceSpec, UpOptions, build_specs
from kiln_cli.up.state_dir import StateDirLock, running_url
from kiln_cli.up.supervisor import Supervisor
from kiln_common.base_model_id import ReservedModelId
from kiln_common.model_folder import ModelFolderMissing

# Writes its pid, reports being ready by a file, ends on SIGTERM.
_SERVICE = """
import os, pathlib, signal, sys, threading
folder = pathlib.Path(sys.argv[1])
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
(folder / "pid").write_text(str(os.getpid()))
print('{"event": "hello", "level": "warning", "port": 1}', flush=True)
(folder / "ready").write_text(str(os.getpid()))
stop.wait()
(folder / "stopped_cleanly").touch()
"""


def _spec(folder: Path, name: str = "engine", code: str = _SERVICE) -> ServiceSpec:
    folder.mkdir(exist_ok=True)

    async def probe() -> str | None:
        ready = folder / "ready"
        return "here" if ready.exists() and ready.read_text() else None

    return ServiceSpec(name, (sys.executable, "-c", code, str(folder)), probe, stop_timeout_s=5.0)


def _console(tmp_path: Path) -> tuple[UpConsole, io.StringIO]:
    console = UpConsole("http://localhost:1", tmp_path / "logs", is_verbose=False)
    out = io.StringIO()
    console._out = Console(file=out, width=200)
    return console, out


async def test_a_killed_service_is_started_again_and_all_stop_cleanly(tmp_path):
    console, out = _console(tmp_path)
    supervisor = Supervisor([_spec(tmp_path / "a")], tmp_path, console)
    running = asyncio.create_task(supervisor.run())
    process = supervisor.processes["engine"]
    await asyncio.wait_for(process.is_ready.wait(), 60)
    first_pid = process.pid
    (tmp_path / "a" / "ready").unlink()
    os.kill(first_pid, signal.SIGKILL)
    while process.pid == first_pid or not process.is_ready.is_set():
        await asyncio.sleep(0.02)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    assert (tmp_path / "a" / "stopped_cleanly").exists()
    text = out.getvalue()
    assert "was killed by signal 9" in text
    assert "Ready: http://localhost:1" in text
    assert "hello port=1" in text
    assert (tmp_path / "logs" / "engine.log").read_text().count("hello") == 2


async def test_a_service_that_cannot_start_ends_everything_with_its_last_lines(tmp_path):
    console, out = _console(tmp_path)
    broken = _spec(tmp_path / "b", "gateway", "print('bad setting: port'); raise SystemExit(3)")
    supervisor = Supervisor([_spec(tmp_path / "a"), broken], tmp_path, console)
    assert await asyncio.wait_for(supervisor.run(), 60) == 1
    assert "gateway could not start" in out.getvalue()
    assert "bad setting: port" in out.getvalue()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "a" / "pid").read_text()), 0)


async def test_a_service_with_bad_settings_is_not_tried_again(tmp_path):
    console, out = _console(tmp_path)
    code = """
import sys
print('{"event": "loading", "level": "info"}', file=sys.stderr)
print('KILN_ENGINE_X: bad', file=sys.stderr)
sys.exit(78)
"""
    supervisor = Supervisor(
        [_spec(tmp_path / "a", "redis"), _spec(tmp_path / "b", code=code)], tmp_path, console
    )
    assert await asyncio.wait_for(supervisor.run(), 60) == 78
    assert (tmp_path / "logs" / "engine.log").read_text().endswith("KILN_ENGINE_X: bad\n")
    # Why it ended, without what it had logged before.
    assert "engine cannot start like this, and trying again would not help:\n  KILN_ENGINE_X: bad" in (
        out.getvalue()
    )
    assert out.getvalue().count("KILN_ENGINE_X") == 1
    assert "starting it again" not in out.getvalue()


async def test_a_service_that_was_ready_is_started_again_whatever_its_exit_code(tmp_path):
    console, out = _console(tmp_path)
    code = _SERVICE.replace("stop.wait()", "stop.wait(); os._exit(78)")
    supervisor = Supervisor([_spec(tmp_path / "a", code=code)], tmp_path, console)
    running = asyncio.create_task(supervisor.run())
    process = supervisor.processes["engine"]
    await asyncio.wait_for(process.is_ready.wait(), 60)
    first_pid = process.pid
    (tmp_path / "a" / "ready").unlink()
    os.kill(first_pid, signal.SIGTERM)
    while process.pid == first_pid or not process.is_ready.is_set():
        await asyncio.sleep(0.02)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    assert "ended with code 78; starting it again" in out.getvalue()


async def test_an_engine_that_was_asked_to_end_was_drained_and_is_back_at_once_however_often(tmp_path):
    console, out = _console(tmp_path)
    supervisor = Supervisor([_spec(tmp_path / "a", "engine-2")], tmp_path, console)
    running = asyncio.create_task(supervisor.run())
    process = supervisor.processes["engine-2"]
    for _ in range(3):
        await asyncio.wait_for(process.is_ready.wait(), 60)
        pid = process.pid
        (tmp_path / "a" / "ready").unlink()
        os.kill(pid, signal.SIGTERM)
        while process.pid == pid:
            await asyncio.sleep(0.02)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0
    told = [line.strip() for line in out.getvalue().splitlines() if "starting it again" in line]
    assert told == ["↻ engine-2  was drained and has ended; starting it again in 0.2 s"] * 3


@pytest.mark.parametrize(
    ("name", "code", "how"),
    [
        ("gateway", 0, "was drained and has ended"),
        ("registry", 0, "was stopped"),
        ("engine", -15, "was stopped before it was ready"),
        ("trainer", 143, "was stopped before it was ready"),
        ("trainer", 1, "ended with code 1"),
        ("redis", -9, "was killed by signal 9"),
    ],
)
def test_how_a_service_ended_is_told_in_words(name, code, how):
    assert how_it_ended(name, code) == how


def test_a_port_in_use_is_refused_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUse, match=str(taken.getsockname()[1])):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_one_state_folder_belongs_to_one_supervisor(tmp_path):
    with StateDirLock(tmp_path), pytest.raises(StateDirInUse):
        StateDirLock(tmp_path)
    with StateDirLock(tmp_path):
        pass


def test_a_state_folder_says_where_its_services_answer_while_they_run(tmp_path):
    assert running_url(tmp_path / "nowhere") is None
    with StateDirLock(tmp_path) as lock:
        assert running_url(tmp_path) is None
        lock.announce("http://127.0.0.1:8421")
        assert running_url(tmp_path) == "http://127.0.0.1:8421"
    assert running_url(tmp_path) is None


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8421"),
        ("0.0.0.0", "http://127.0.0.1:8421"),
        ("::", "http://[::1]:8421"),
        ("box.local", "http://box.local:8421"),
    ],
)
def test_what_listens_everywhere_is_reached_on_loopback(host, url):
    assert reachable_url(host, 8421) == url


# A supervisor that dies at once and leaves a service that holds its lock; prints the service's pid.
_KILLED_SUPERVISOR = """
import os, pathlib, subprocess, sys
from kiln_cli.up.state_dir import StateDirLock
lock = StateDirLock(pathlib.Path(sys.argv[1]))
service = [sys.executable, "-c", "import sys; sys.stdin.read()"]
print(subprocess.Popen(service, stdin=0, stdout=subprocess.DEVNULL, pass_fds=[lock.fd]).pid, flush=True)
os._exit(9)
"""


def test_a_state_folder_is_free_once_the_services_of_a_killed_supervisor_have_gone(tmp_path):
    command = [sys.executable, "-c", _KILLED_SUPERVISOR, str(tmp_path)]
    read_end, write_end = os.pipe()
    killed = subprocess.Popen(command, stdin=read_end, stdout=subprocess.PIPE)
    os.close(read_end)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.wait(60)
    with pytest.raises(StateDirInUse):
        StateDirLock(tmp_path, wait_s=0.2)
    threading.Timer(0.3, os.close, [write_end]).start()  # now the service ends
    with StateDirLock(tmp_path, wait_s=20):
        pass
    killed.stdout.close()


async def test_a_stop_while_a_service_is_being_started_still_stops_it(tmp_path):
    console, _ = _console(tmp_path)
    supervisor = Supervisor([_spec(tmp_path / "a"), _spec(tmp_path / "b", "gateway")], tmp_path, console)
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)
    supervisor.request_stop()
    assert await asyncio.wait_for(running, 60) == 0


async def test_a_service_that_cannot_be_executed_ends_everything(tmp_path):
    console, _ = _console(tmp_path)
    missing = ServiceSpec("redis", (str(tmp_path / "nothing"),), _spec(tmp_path / "a").probe)
    supervisor = Supervisor([missing, _spec(tmp_path / "a")], tmp_path, console)
    with pytest.raises(FileNotFoundError):
        await asyncio.wait_for(supervisor.run(), 60)
    assert supervisor.processes["engine"].pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(supervisor.processes["engine"].pid, 0)


@pytest.mark.parametrize(
    ("host", "variable", "value", "is_refused"),
    [
        ("127.0.0.1", "", "", False),
        ("localhost", "", "", False),
        ("::1", "", "", False),
        ("0.0.0.0", "", "", True),
        ("192.168.1.7", "KILN_GATEWAY_API_KEYS", "[]", True),
        ("0.0.0.0", "KILN_GATEWAY_API_KEYS", '[{"key": "0123456789abcdef"}]', False),
        ("0.0.0.0", "KILN_GATEWAY_API_KEYS_FILE", "/etc/kiln/keys.json", False),
        ("0.0.0.0", "KILN_GATEWAY_ALLOW_PUBLIC_BIND", "true", False),
    ],
)
def test_a_public_address_without_keys_is_refused_before_anything_starts(
    monkeypatch, host, variable, value, is_refused
):
    for name in ("KILN_GATEWAY_API_KEYS", "KILN_GATEWAY_ALLOW_PUBLIC_BIND"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    with pytest.raises(PublicHostWithoutKeys) if is_refused else contextlib.nullcontext():
        check_host(host)


def test_variables_that_kiln_up_overrules_are_named_with_what_chooses_instead(tmp_path):
    options = UpOptions("m", False, "127.0.0.1", 8421, tmp_path, tmp_path)
    environment = {
        "KILN_GATEWAY_PORT": "9000",
        "KILN_ENGINE_MODEL_PATH": "m",  # what it would be anyway
        "KILN_ENGINE_NUM_THREADS": "2",  # reaches the engine
    }
    lines = overruled_variables(environment, build_specs(options))
    assert lines == ["KILN_GATEWAY_PORT has no effect here: --port chooses that for kiln up"]


async def test_services_do_not_get_variables_that_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_QUANTISATION", "fp8")
    monkeypatch.setenv("KILN_ENGINE_NUM_THREADS", "1")
    console, _ = _console(tmp_path)
    code = "import os; print(sorted(n for n in os.environ if n.startswith('KILN_'))); raise SystemExit(78)"
    supervisor = Supervisor([_spec(tmp_path / "a", code=code)], tmp_path, console)
    await asyncio.wait_for(supervisor.run(), 60)
    told = (tmp_path / "logs" / "engine.log").read_text()
    assert "KILN_ENGINE_NUM_THREADS" in told
    assert "KILN_QUANTISATION" not in told


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere"])
def test_a_model_folder_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(ModelFolderMissing):
        build_options(
            model=model, host="127.0.0.1", port=0, state_dir=tmp_path, served_model_name=None, device=None
        )


def test_a_served_name_that_means_something_else_is_refused(tmp_path):
    with pytest.raises(ReservedModelId, match="bare base model"):
        build_options(
            model=None, host="127.0.0.1", port=0, state_dir=tmp_path, served_model_name="base", device=None
        )


def test_a_long_state_folder_gets_a_short_folder_for_sockets(tmp_path):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    run_dir = make_run_dir(deep)
    assert len(str(run_dir)) < 70
    assert make_run_dir(deep) == run_dir  # a second start leaves no second folder behind
    run_dir.rmdir()
    run_dir.symlink_to(tmp_path)
    try:
        with pytest.raises(StateDirUnusable):
            make_run_dir(deep)
    finally:
        run_dir.unlink()


def test_an_external_redis_replaces_the_private_one(tmp_path):
    options = UpOptions("m", False, "127.0.0.1", 1, tmp_path, tmp_path, redis_url="redis://elsewhere:6379")
    specs = {spec.name: spec for spec in build_specs(options)}
    assert "redis" not in specs
    assert specs["trainer"].env["KILN_TRAINER_REDIS_URL"] == "redis://elsewhere:6379"


def test_the_private_redis_gets_the_memory_it_is_given(tmp_path):
    options = UpOptions("m", False, "127.0.0.1", 1, tmp_path, tmp_path, redis_memory_mb=64)
    (argv,) = (spec.argv for spec in build_specs(options) if spec.name == "redis")
    assert argv[argv.index("--maxmemory") + 1] == "64mb"


def test_several_gateways_share_the_port_and_know_every_engine(tmp_path):
    options = UpOptions(
        "m", False, "127.0.0.1", 1, tmp_path, tmp_path, num_gateways=3, engine_gpus=("0", "1")
    )
    specs = {spec.name: spec for spec in build_specs(options)}
    gateways = [specs[name].env for name in ("gateway", "gateway-2", "gateway-3")]
    assert {env["KILN_GATEWAY_PORT"] for env in gateways} == {"1"}
    assert all(env["KILN_GATEWAY_REUSE_PORT"] == "true" for env in gateways)
    assert len({env["KILN_GATEWAY_SOCKET_PATH"] for env in gateways}) == 3
    engines = [specs[name].env for name in ("engine", "engine-2")]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in engines] == ["0", "1"]
    assert specs["trainer"].env["CUDA_VISIBLE_DEVICES"] == "0"
    assert len({env["KILN_ENGINE_SOCKET_DIR"] for env in engines}) == 2
    addresses = ",".join(env["KILN_ENGINE_LISTEN"] for env in engines)
    assert gateways[0]["KILN_GATEWAY_ENGINE_ADDRESSES"] == addresses
    # Stopped last to first: gateways, trainer, engines.
    assert list(specs)[-4:] == ["trainer", "gateway", "gateway-2", "gateway-3"]


def test_each_trainer_shares_the_gpu_and_the_weights_of_one_engine(tmp_path):
    options = UpOptions(
        "m", False, "127.0.0.1", 1, tmp_path, tmp_path, engine_gpus=("0", "1", "2"), num_trainers=2
    )
    specs = {spec.name: spec.env for spec in build_specs(options)}
    trainers = [specs[name] for name in ("trainer", "trainer-2")]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in trainers] == ["0", "1"]
    assert [env["KILN_TRAINER_ENGINE_ADDRESSES"] for env in trainers] == [
        specs[name]["KILN_ENGINE_LISTEN"] for name in ("engine", "engine-2")
    ]
    # An address for clients can be listened on once.
    listeners = [env.get("KILN_TRAINER_CLIENT_LISTEN") for env in trainers]
    listeners += [specs[name].get("KILN_ENGINE_CLIENT_LISTEN") for name in ("engine", "engine-2", "engine-3")]
    assert listeners == [None, "", None, "", ""]
    # Whichever claims a job finds its checkpoints.
    assert len({env["KILN_TRAINER_STATE_DIR"] for env in trainers}) == 1
    listens = ",".join(env["KILN_TRAINER_LISTEN"] for env in trainers)
    assert specs["gateway"]["KILN_GATEWAY_TRAINER_ADDRESSES"] == listens
    assert list(specs)[-3:] == ["trainer", "trainer-2", "gateway"]


@pytest.mark.parametrize(
    ("wanted", "engine_gpus", "own_device", "count"),
    [
        (None, ("",), "", 1),
        (None, ("0", "1"), "", 2),
        (None, ("", ""), "", 1),  # on one CPU they would only slow each other down
        (2, ("", ""), "", 2),
        (1, ("0", "1"), "", 1),
        (3, ("0", "1"), "", None),
        (None, ("0", "1"), "cuda:2", 1),
        (2, ("0", "1"), "cuda:2", None),
    ],
)
def test_there_are_no_more_trainers_than_places_for_them(monkeypatch, wanted, engine_gpus, own_device, count):
    monkeypatch.setenv("KILN_TRAINER_DEVICE", own_device)
    if count is None:
        with pytest.raises(TooManyTrainers):
            choose_num_trainers(wanted, engine_gpus)
    else:
        assert choose_num_trainers(wanted, engine_gpus) == count


@pytest.mark.parametrize(
    ("num_engines", "device", "visible", "num_devices", "gpus"),
    [
        (1, None, None, 2, ("",)),
        (2, None, None, 2, ("0", "1")),
        (2, None, "GPU-b, GPU-a,3", 4, ("GPU-b", "GPU-a")),
        (2, None, None, 0, ("", "")),
        (2, "cpu", None, 8, ("", "")),
        (3, None, None, 2, None),
        (2, "cuda", None, 0, None),
        (2, None, "1", 8, None),
    ],
)
def test_each_engine_gets_a_gpu(tmp_path, monkeypatch, num_engines, device, visible, num_devices, gpus):
    monkeypatch.delenv("KILN_ENGINE_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for index in range(num_devices):
        (tmp_path / f"nvidia{index}").touch()
    (tmp_path / "nvidiactl").touch()
    if gpus is None:
        with pytest.raises(NotEnoughGpus):
            assign_gpus(num_engines, device, tmp_path)
    else:
        assert assign_gpus(num_engines, device, tmp_path) == gpus


def test_every_engine_and_nobody_else_is_told_how_to_round_the_weights(tmp_path):
    options = UpOptions(
        "m", False, "127.0.0.1", 1, tmp_path, tmp_path, quantization="int4", engine_gpus=("0", "1")
    )
    told = {spec.name for spec in build_specs(options) if "KILN_ENGINE_QUANTIZATION" in spec.env}
    assert told == {"engine", "engine-2"}
