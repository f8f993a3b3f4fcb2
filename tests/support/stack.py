"""A whole Kiln with real processes, as `kiln up` runs it, for end-to-end tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


def free_port() -> int:
    """A port that nobody has, and that the kernel gives no connection before a server listens there."""
    first_given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chance = random.SystemRandom()  # tests that run beside this one draw others
    while True:
        port = chance.randrange(10_000, max(first_given_out, 20_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    """Poll until `condition()` is neither None nor False; returns what it returned."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found is not None and found is not False:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s for {what}")


class Stack:
    """`kiln up` in a process of its own, over its own state folder."""

    def __init__(self, state_dir: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.state_dir = state_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = options
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 180.0) -> Stack:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from kiln_cli.main import main; main()", "up"]
        command += ["--port", str(self.port), "--state-dir", str(self.state_dir), *self._options]
        with (self.state_dir / "up.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **self._env}
            )
        try:
            self.wait_until_ready(timeout_s)
        except BaseException:  # or the services would outlive the test
            if self._process.poll() is None:
                self.stop()
            raise
        return self

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def kill_supervisor(self) -> None:
        """SIGKILL `kiln up` itself, so that nobody stops its services."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(60)

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Until /readyz answers 200 and the trainer accepts jobs too."""
        assert self._process is not None

        def is_ready() -> bool:
            if self._process is not None and self._process.poll() is not None:
                raise AssertionError(f"kiln up ended:\n{(self.state_dir / 'up.log').read_text()}")
            try:
                return (
                    httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
                    and httpx.get(f"{self.url}/v1/train/status", timeout=2).status_code == 200
                )
            except httpx.HTTPError:
                return False

        wait_for(is_ready, f"{self.url}/readyz; logs in {self.state_dir}/logs", timeout_s)

    def pid(self, service: str) -> int | None:
        try:
            return int((self.state_dir / "pids" / f"{service}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def kill(self, service: str) -> int:
        """SIGKILL the service; returns the pid that died."""
        pid = wait_for(lambda: self.pid(service), f"the pid of {service}")
        os.kill(pid, signal.SIGKILL)
        return pid

    @contextmanager
    def stopped(self, service: str) -> Iterator[None]:
        """SIGSTOP the service for as long as the context lasts: its callers wait."""
        pid = wait_for(lambda: self.pid(service), f"the pid of {service}")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def wait_for_restart(self, service: str, dead_pid: int, timeout_s: float = 120.0) -> int:
        def restarted() -> int | None:
            pid = self.pid(service)
            return pid if pid is not None and pid != dead_pid else None

        return wait_for(restarted, f"{service} to be started again", timeout_s)

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", timeout=30).raise_for_status().json()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def chat(self, content: str, **fields: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}
        )

    def wait_for_job(self, job_id: str, timeout_s: float = 240.0) -> dict[str, Any]:
        """The job once it has ended."""

        def ended() -> dict[str, Any] | None:
            try:
                job = self.get(f"/v1/train/jobs/{job_id}")
            except httpx.HTTPError:  # a service is on its way back
                return None
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return wait_for(ended, f"job {job_id} to end", timeout_s)
