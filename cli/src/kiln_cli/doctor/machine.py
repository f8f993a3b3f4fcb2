"""Checks of the machine: Python, packages, memory, disk, GPU and driver, compiler, port."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import httpx

from kiln_cli.adapters.tables import size
from kiln_cli.doctor.check import Finding, State, ok
from kiln_cli.up.mps import has_nvidia_gpu

_GIB = 2**30
_LEAST_DISK_BYTES, _ENOUGH_DISK_BYTES = _GIB, 5 * _GIB
_LEAST_MEMORY_BYTES = 2 * _GIB
_OLDEST_CAPABILITY = 8.0
_TOOL_TIMEOUT_S = 20.0


def python() -> Finding:
    version = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding(State.WARNING, version, "Kiln is tried on Linux; weights are shared only there.")
    return ok(version)


def packages() -> Finding:
    """The services, and the library that computes."""
    names = ("kiln-engine", "kiln-trainer", "kiln-registry", "kiln-gateway")
    missing = [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        return Finding(
            State.FAILED, f"{', '.join(missing)} are not installed", "make setup installs what is missing."
        )
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding(State.FAILED, "torch is not installed", "make setup installs what is missing.")
    if has_nvidia_gpu() and torch.endswith("+cpu"):
        return Finding(
            State.WARNING,
            f"torch {torch} cannot use this machine's GPU",
            "pip install --force-reinstall 'torch>=2.11,<2.14' brings the build for CUDA.",
        )
    return ok(f"torch {torch}")


def memory() -> Finding:
    available = _available_memory_bytes()
    if available is None:
        return Finding(State.SKIPPED, "this system does not say how much memory is free")
    detail = f"{size(available)} free"
    if available < _LEAST_MEMORY_BYTES:
        return Finding(State.WARNING, detail, "Close other programs: the demo model alone takes 2 GiB.")
    return ok(detail)


def _available_memory_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def disk(state_dir: Path) -> Finding:
    """Room for adapters, jobs and logs, in a folder that may be written."""
    folder = state_dir
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding(
            State.FAILED, f"{state_dir} may not be written", "Choose another: kiln up --state-dir FOLDER."
        )
    free = shutil.disk_usage(folder).free
    detail = f"{size(free)} free for {state_dir}"
    hint = "Make room, or choose another disk: kiln up --state-dir FOLDER."
    if free < _LEAST_DISK_BYTES:
        return Finding(State.FAILED, detail, hint)
    return Finding(State.WARNING, detail, hint) if free < _ENOUGH_DISK_BYTES else ok(detail)


def gpu() -> Finding:
    """The driver, as it says itself."""
    if not has_nvidia_gpu():
        return Finding(State.SKIPPED, "there is no NVIDIA GPU; the CPU is used")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(
            State.WARNING,
            "nvidia-smi is not there",
            "Install the driver's tools, or mount them in a container.",
        )
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    command = [tool, query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    if done.returncode:
        return Finding(
            State.FAILED,
            f"the driver does not answer: {(done.stdout + done.stderr).strip()[:200]}",
            "Load or install NVIDIA's driver; in a container, run it with --gpus all.",
        )
    found = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    detail = "; ".join(
        f"{name}, {memory}, driver {driver}, compute {cap}" for name, driver, memory, cap in found
    )
    if any(float(cap) < _OLDEST_CAPABILITY for *_, cap in found):
        hint = (
            f"The kernels need compute capability {_OLDEST_CAPABILITY:g}; such a GPU computes in plain torch."
        )
        return Finding(State.WARNING, detail, hint)
    return ok(detail)


def compiler() -> Finding:
    """Triton builds the launchers of kernels with one."""
    if not has_nvidia_gpu():
        return Finding(State.SKIPPED, "without a GPU nothing is compiled")
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        return Finding(State.FAILED, "there is no C compiler", "Install gcc, or name one in CC.")
    return ok(found)


def port(number: int) -> Finding:
    """Free for `kiln up`, or taken by a Kiln."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            reason = error.strerror
        else:
            return ok(f"{number} is free")
    try:
        answer = httpx.get(f"http://127.0.0.1:{number}/healthz", timeout=2.0, trust_env=False)
        if answer.status_code == 200 and answer.headers.get("x-request-id"):
            return ok(f"{number} is served by a Kiln")
    except httpx.HTTPError:
        pass
    return Finding(
        State.FAILED,
        f"{number}: {reason}",
        f"Stop what uses it, or choose another: kiln up --port {number + 1}.",
    )
