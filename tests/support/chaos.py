"""A whole Kiln that faults are done to, and what its users are asked about afterwards."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kiln_cli.up.options import make_run_dir
from kiln_common.bus import keys
from kiln_common.bus.connect import connect
from kiln_common.bus.private_server import PrivateRedis
from tests.support.stack import Stack, wait_for

ENGINES = ("engine", "engine-2")


class System:
    """`kiln up` with two engines and two gateways over a Redis of ours.

    `outage_s`: how long something is taken away. Timeouts that decide how soon others notice are short.
    """

    def __init__(self, folder: Path, outage_s: float) -> None:
        self.outage_s = outage_s
        self.redis = PrivateRedis(folder / "redis", max_memory_mb=256)
        self._clock_file = folder / "clock"
        self.shift_clocks(0)
        env = {
            "LD_PRELOAD": str(_build_shifted_clock(folder)),
            "KILN_TEST_CLOCK_FILE": str(self._clock_file),
            "KILN_REDIS_URL": self.redis.url,
            "KILN_GATEWAY_ENGINE_SILENCE_S": "2",
            "KILN_TRAINER_CLAIM_TIMEOUT_S": "2",
        }
        self.env = env
        self.stack = Stack(folder / "stack", "--gateways", "2", "--engines", "2", env=env)

    def __enter__(self) -> System:
        self.redis.start()
        try:
            self.stack.start(timeout_s=180)
        except BaseException:
            self.redis.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.stack.stop()
        finally:
            self.redis.close()

    def wait_until_whole(self, timeout_s: float = 120.0) -> float:
        """Wait until both engines, the trainer, the registry and Redis are well; seconds it took."""
        began_s = time.monotonic()

        def is_whole() -> bool:
            try:
                health = httpx.get(f"{self.stack.url}/health", timeout=5).json()
            except (httpx.HTTPError, ValueError):
                return False
            engines = [engine["status"] for engine in health["engines"]]
            return set(health["dependencies"].values()) == {"ok"} and engines == ["ok", "ok"]

        for _ in range(4):  # whichever gateway answers
            wait_for(is_whole, "the whole system", timeout_s)
        return time.monotonic() - began_s

    @contextlib.contextmanager
    def stopped(self, *services: str) -> Iterator[None]:
        """SIGSTOP: the processes are there and do nothing."""
        pids = [wait_for(lambda s=service: self.stack.pid(s), service) for service in services]  # type: ignore[misc]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def no_room_for_files(self, service: str, num_bytes: int = 4096) -> Iterator[None]:
        """The service can write no file beyond `num_bytes`, as on a full disk."""
        pid = wait_for(lambda: self.stack.pid(service), service)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    @contextlib.contextmanager
    def full_redis(self) -> Iterator[None]:
        """Redis refuses whatever needs memory."""
        client = connect(self.redis.url)
        before = client.config_get("maxmemory")["maxmemory"]
        client.config_set("maxmemory", "1mb")
        try:
            yield
        finally:
            client.config_set("maxmemory", before)
            client.close()

    def shift_clocks(self, seconds: int) -> None:
        """Make the wall clocks of all services wrong by that much; Redis keeps its own."""
        with self._clock_file.open("r+b" if self._clock_file.exists() else "w+b") as file:
            file.write(struct.pack("=q", seconds))

    @property
    def run_dir(self) -> Path:
        """Where the services' sockets are."""
        return make_run_dir(self.stack.state_dir)

    def num_claims(self, job_id: str) -> int:
        client = connect(self.redis.url)
        events = client.xrange(keys.job_events(job_id))
        client.close()
        return sum(fields[b"type"] == b"claimed" for _, fields in events)

    def submit(self, adapter: str, epochs: int = 4, **fields: Any) -> httpx.Response:
        examples = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(1, 5)]
        body = {
            "adapter": adapter,
            "base_adapter": None,
            "examples": examples,
            "epochs": epochs,
            "checkpoint_every": 1,
            "lora": {"rank": 4, "alpha": 8},
            "attach": False,
        }
        return self.stack.post("/v1/train/sft", body | fields)

    def accept(self, adapter: str, epochs: int = 4, **fields: Any) -> str:
        """A job that was accepted; its id."""
        response = self.submit(adapter, epochs, **fields)
        assert response.status_code == 202, response.text
        return response.json()["id"]

    def wait_for_step(self, job_id: str, step: int) -> None:
        wait_for(
            lambda: self.stack.get(f"/v1/train/jobs/{job_id}")["progress"]["step"] >= step,
            f"step {step} of {job_id}",
        )

    def succeeded(self, job_id: str) -> dict[str, Any]:
        job = self.stack.wait_for_job(job_id)
        assert job["status"] == "succeeded", job
        return job

    def versions(self, adapter: str) -> list[int]:
        entry = next(e for e in self.stack.get("/v1/adapters")["data"] if e["name"] == adapter)
        return [version["version"] for version in entry["versions"]]


def _build_shifted_clock(folder: Path) -> Path:
    library = folder / "shifted_clock.so"
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return library
