"""The sandbox runs code, and each way out that was tried ends at a wall or at a limit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kiln_common
from kiln_common.errors import InvalidValue
from kiln_common.sandbox import Language, Limits, Result, SandboxUnavailable, Stop, run

MIB = 1024 * 1024
Run = Callable[..., Result]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def python(work: Path) -> Run:
    try:
        run("", Language.SHELL, work)
    except SandboxUnavailable as error:
        pytest.skip(error.message)
    return lambda code, **limits: run(code, Language.PYTHON, work, Limits(**limits))


@pytest.fixture
def shell(python: Run, work: Path) -> Run:
    return lambda code, **limits: run(code, Language.SHELL, work, Limits(**limits))


def _errors(python: Run, calls: list[str]) -> list[str]:
    """What each call fails with inside; a call that works is "done"."""
    code = f"""
import ctypes, mmap, os, socket
for call in {calls!r}:
    try:
        exec(call)
        print("done")
    except OSError as error:
        print(error.strerror)
"""
    return python(code).stdout.splitlines()


def test_python_prints_and_writes_in_its_work_folder(python: Run, work: Path):
    result = python("print(6 * 7); open('answer.txt', 'w').write('42')")
    assert (result.exit_code, result.stdout, result.stderr, result.stopped) == (0, "42\n", "", None)
    assert (work / "answer.txt").read_text() == "42"


def test_shell_gives_its_exit_code_and_both_outputs(shell: Run):
    result = shell("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_signal_shows_in_the_exit_code(shell: Run):
    assert shell("kill -SEGV $$").exit_code == 128 + signal.SIGSEGV


def test_modules_of_the_work_folder_can_be_imported(python: Run, work: Path):
    (work / "helper.py").write_text("VALUE = 5")
    assert python("import helper; print(helper.VALUE)").stdout == "5\n"


def test_the_network_is_unreachable_even_on_this_machine(python: Run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = [("127.0.0.1", server.getsockname()[1]), ("1.1.1.1", 53)]
        calls = [f"socket.create_connection({address}, 2)" for address in addresses]
        assert _errors(python, calls) == ["Network is unreachable"] * 2


def test_socket_families_that_know_no_network_namespace_are_refused(python: Run):
    calls = ["socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "socket.socket(38, socket.SOCK_SEQPACKET)"]
    assert _errors(python, calls) == ["Operation not permitted"] * 2


def test_files_outside_are_not_there_to_read(python: Run, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("do not tell")
    paths = [secret, Path("/etc/passwd"), Path("/etc/shadow"), Path.home() / ".bashrc", Path(__file__)]
    errors = _errors(python, [f"open({str(path)!r})" for path in paths])
    assert errors == ["No such file or directory"] * len(paths)


def test_a_link_out_of_the_work_folder_leads_nowhere(python: Run, work: Path, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("do not tell")
    (work / "link").symlink_to(tmp_path / "secret.txt")
    assert "No such file or directory" in python("print(open('link').read())").stderr


def test_nothing_outside_the_work_folder_can_be_written(python: Run):
    paths = ["/usr/bin/ls", "/usr/new", "/new", f"{sys.base_prefix}/new", "/sandbox/code/main", "/dev/new"]
    errors = _errors(python, [f"open({path!r}, 'a')" for path in paths] + ["os.mkdir('/new')"])
    assert set(errors) <= {"Read-only file system", "Permission denied"}
    assert len(errors) == len(paths) + 1


def test_the_environment_of_this_process_is_not_passed_on(python: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KILN_SECRET", "do not tell")
    result = python("import os; print(sorted(os.environ))")
    assert result.stdout == "['HOME', 'LANG', 'PATH', 'PYTHONPATH', 'TMPDIR']\n"


def test_proc_shows_no_process_outside_and_not_the_keeper(python: Run):
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()) == [1, os.getpid()])"
    assert python(code).stdout == "True\n"
    calls = [f"os.listdir('/proc/1/{name}')" for name in ("root", "cwd", "fd")]
    calls += [f"open('/proc/1/{name}', 'rb').read(1)" for name in ("environ", "mem")]
    calls += ["open('/proc/1/oom_score_adj', 'w')", "open('/proc/sys/vm/drop_caches', 'w')"]
    assert _errors(python, calls) == ["Permission denied"] * len(calls)


def test_no_privilege_can_be_had(python: Run):
    status = python("print(open('/proc/self/status').read())").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    user, mount, network = 0x10000000, 0x00020000, 0x40000000
    code = f"import ctypes; print([ctypes.CDLL(None).unshare(flag) for flag in {[user, mount, network]}])"
    assert python(code).stdout == "[-1, -1, -1]\n"
    assert "done" not in _errors(python, ["os.setuid(0)", "os.setgid(0)", "os.chroot('/tmp')"])


def test_the_keeper_and_processes_outside_cannot_be_killed(python: Run):
    code = f"""
import os
os.kill(1, 9)
os.kill(1, 19)
for process in ({os.getpid()}, {os.getppid()}):
    try:
        os.kill(process, 9)
    except ProcessLookupError:
        print("no such process")
"""
    assert python(code).stdout == "no such process\n" * 2


def test_killing_all_one_can_ends_nobody_else(python: Run):
    """Signal -1 goes to every process but the sender and process 1: there is none."""
    assert _errors(python, ["os.kill(-1, 9)"]) == ["No such process"]


def test_endless_code_is_stopped_by_the_time_limit(python: Run):
    result = python("while True: pass", time_s=0.3)
    assert (result.stopped, result.exit_code) == (Stop.TIME, None)
    assert "seconds; the limit is 0.3" in result.message
    assert result.duration_s >= 0.3


def test_code_that_closes_its_outputs_is_still_stopped(python: Run):
    result = python("import os, time; os.close(1); os.close(2); time.sleep(60)", time_s=0.3)
    assert result.stopped is Stop.TIME


def test_endless_output_is_cut_and_stopped(shell: Run):
    result = shell("yes", output_bytes=100_000)
    assert result.stopped is Stop.OUTPUT
    assert len(result.stdout) == 100_000
    assert "bytes of output; the limit is 100000" in result.message


def test_a_fork_bomb_is_stopped_by_the_process_limit(shell: Run):
    result = shell("bomb() { bomb | bomb; }; bomb", time_s=20)
    assert result.stopped is Stop.PROCESSES
    assert "processes and threads; the limit is 32" in result.message


def test_the_kernel_itself_bounds_the_processes(python: Run):
    """Between two looks of the watcher no more can start than the limit and what is to spare."""
    code = """
import os
num = 1
try:
    while num < 200:
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
        num += 1
except BlockingIOError:
    os.write(1, str(num).encode())
"""
    result = python(code, num_processes=8, time_s=20)
    # Whichever comes first, the watcher or the kernel.
    counted = result.message.split()[5] if result.stopped is Stop.PROCESSES else result.stdout
    assert int(counted) <= 24


def test_memory_is_limited_for_one_process_and_for_all_together(python: Run):
    assert "MemoryError" in python("bytearray(1 << 40)").stderr
    one = python("held = bytearray(300 * 2**20)\nwhile True: pass", memory_bytes=100 * MIB, time_s=20)
    assert one.stopped is Stop.MEMORY
    assert f"bytes of memory; the limit is {100 * MIB}" in one.message
    several = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        held = bytearray(30 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(60)
time.sleep(60)
"""
    assert python(several, memory_bytes=100 * MIB, time_s=20).stopped is Stop.MEMORY


def test_memory_that_belongs_to_no_process_is_refused(python: Run):
    calls = [
        "os.memfd_create('x')",
        "mmap.mmap(-1, 4096)",
        "open('/tmp/large', 'wb').write(bytes(32 * 2**20))",
    ]
    assert _errors(python, calls) == ["Operation not permitted"] * 2 + ["No space left on device"]
    assert (
        python(
            "import ctypes; c = ctypes.CDLL(None); print(c.shmget(0, 4096, 896), c.semget(0, 9, 896), c.msgget(0, 896))"
        ).stdout
        == "-1 -1 -1\n"
    )


def test_what_is_written_to_the_work_folder_is_limited(python: Run):
    one = python("open('large', 'wb').write(bytes(20 * 2**20))", disk_bytes=10 * MIB)
    assert "File too large" in one.stderr
    many = "import itertools\nfor n in itertools.count(): open(str(n), 'wb').write(bytes(2**20))"
    result = python(many, disk_bytes=10 * MIB)
    assert result.stopped is Stop.DISK
    assert "bytes added to the work folder" in result.message
    # Other names: what was there before and is emptied would count as room that was given back.
    empty = "import itertools\nfor n in itertools.count(): open(f'empty-{n}', 'w').close()"
    assert python(empty, disk_bytes=MIB, time_s=20).stopped is Stop.DISK


def test_files_below_any_path_count_against_the_disk_limit(python: Run):
    """Longer than the longest path, and deeper than is looked."""
    code = "import os, time\nfor _ in range({}):\n    os.mkdir({!r})\n    os.chdir({!r})\n"
    fill = "while True:\n    open(str(time.time()), 'wb').write(bytes(2**20))\n    time.sleep(0.01)"
    long = python(code.format(30, "a" * 200, "a" * 200) + fill, disk_bytes=10 * MIB, time_s=20)
    assert (long.stopped, "bytes added" in long.message) == (Stop.DISK, True)
    deep = python(code.format(100, "b", "b") + fill, disk_bytes=2**40, time_s=20)
    assert (deep.stopped, "cannot be read" in deep.message) == (Stop.DISK, True)


def test_what_the_code_leaves_behind_dies_with_it(shell: Run, work: Path):
    """The background loop holds the pipe and would add to the file for ever."""
    result = shell("setsid sh -c 'while true; do echo x >> beats; done' & while [ ! -s beats ]; do :; done")
    assert result.exit_code == 0
    num_bytes = (work / "beats").stat().st_size
    assert num_bytes > 0
    assert (work / "beats").stat().st_size == num_bytes


_CALLER = """
import sys
from pathlib import Path
from kiln_common.sandbox import *
{before}
try:
    print(run(sys.argv[1], Language.PYTHON, Path(sys.argv[2]), Limits(time_s=60)), flush=True)
except SandboxUnavailable as error:
    print(error.message, error.hint)
"""


def test_the_code_dies_when_the_process_that_started_it_is_killed(python: Run, work: Path):
    code = "import time\nwhile True: open('beats', 'a').write('x'); time.sleep(0.01)"
    caller = subprocess.Popen([sys.executable, "-c", _CALLER.format(before=""), code, str(work)])
    beats = work / "beats"
    _wait_until(lambda: beats.exists() and beats.stat().st_size > 2)
    caller.kill()
    caller.wait()
    _wait_until(lambda: not _processes_in(work))


def _processes_in(folder: Path) -> list[str]:
    """Processes whose current directory is `folder`, as root or the same user sees them."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.path.samefile(process / "cwd", folder):
                found.append(process.name)
        except OSError:
            continue
    return found


def _wait_until(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


_FORBID_NAMESPACES = """
import os
from kiln_common.sandbox import syscalls
user_id = os.geteuid()
syscalls.unshare(syscalls.CLONE_NEWUSER)
open("/proc/self/uid_map", "w").write(f"1000 {user_id} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
"""


def test_code_is_not_run_where_namespaces_are_missing(python: Run, work: Path):
    """Inside a user namespace that allows no other, as on a machine where they are switched off."""
    program = [sys.executable, "-c", _CALLER.format(before=_FORBID_NAMESPACES), "open('ran', 'w')", str(work)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert "code cannot be isolated on this machine, so it was not run: making namespaces" in result.stdout
    assert "max_user_namespaces above 0" in result.stdout
    assert not (work / "ran").exists()


def test_an_ordinary_user_has_the_same_walls(python: Run, tmp_path: Path):
    """Run as a user without privileges, from a Python that user can read."""
    system_python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    is_new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    if os.geteuid() != 0 or system_python is None or subprocess.call([system_python, "-c", is_new_enough]):
        pytest.skip("all other tests run as an ordinary user, or there is no system Python of 3.11 or newer")
    user_id = 54321
    ours = [folder for folder in tmp_path.parents if "pytest-of-" in str(folder)]
    for folder in [tmp_path, *ours]:
        folder.chmod(0o755)
    work = tmp_path / "theirs"
    work.mkdir()
    os.chown(work, user_id, user_id)
    package = tmp_path / "lib" / "kiln_common"
    shutil.copytree(Path(kiln_common.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = tmp_path / "venv"
    subprocess.run([system_python, "-m", "venv", "--without-pip", str(environment)], check=True)
    (next(environment.glob("lib/python3*/site-packages")) / "kiln.pth").write_text(str(package.parent))
    code = """
import os, socket
for call in (lambda: open("/etc/passwd"), lambda: os.mkdir("/usr/new"), lambda: socket.create_connection(("1.1.1.1", 53))):
    try:
        call()
    except OSError as error:
        print(os.getuid(), error.strerror, flush=True)
while True:
    os.fork()
"""
    result = subprocess.run(
        [environment / "bin" / "python", "-c", _CALLER.format(before=""), code, str(work)],
        capture_output=True,
        text=True,
        user=user_id,
        group=user_id,
        extra_groups=[],
        cwd=work,
        check=False,
    )
    for reason in ("No such file or directory", "Read-only file system", "Network is unreachable"):
        assert f"{user_id} {reason}" in result.stdout, result.stderr
    assert "processes and threads; the limit is 32" in result.stdout


def test_a_folder_of_roots_is_given_to_nobody_and_other_owners_keep_theirs(python: Run, work: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    assert python("import os; print(os.getuid())").stdout == "65534\n"
    os.chown(work, 54321, 54321)
    assert python("import os; print(os.getuid())").stdout == "54321\n"


def test_what_cannot_be_run_is_refused(python: Run, tmp_path: Path):
    with pytest.raises(InvalidValue, match="is not a folder"):
        run("", Language.PYTHON, tmp_path / "none")
    with pytest.raises(InvalidValue, match="the code has 1048577 bytes, the limit is 1048576"):
        python(" " * (MIB + 1))
    with pytest.raises(InvalidValue, match="not Unicode text"):
        python("\ud800")
