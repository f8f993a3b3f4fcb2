"""More gateways beside the one of a running `kiln up`, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.support.stack import Stack, free_port, wait_for

_READY_TIMEOUT_S = 60.0


@contextlib.contextmanager
def more_gateways(stack: Stack, model: Path, count: int) -> Iterator[list[str]]:
    """Base URLs of `count` further gateways of the stack's engine; they end with the context."""
    run_dir = stack.state_dir / "run"
    processes, urls = [], []
    try:
        for number in range(count):
            port = free_port()
            environment = {
                **os.environ,
                "KILN_GATEWAY_PORT": str(port),
                "KILN_GATEWAY_MODEL_PATH": str(model),
                "KILN_GATEWAY_ENGINE_ADDRESSES": f"unix:{run_dir}/engine.sock",
                "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{run_dir}/registry.sock",
                "KILN_GATEWAY_TRAINER_ADDRESS": f"unix:{run_dir}/trainer.sock",
                "KILN_GATEWAY_REDIS_URL": f"unix://{run_dir}/redis.sock",
            }
            with (stack.state_dir / f"gateway-{number + 2}.log").open("ab") as log:
                command = [sys.executable, "-m", "kiln_gateway"]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            wait_for(lambda url=url: _is_ready(url), f"{url}/readyz", _READY_TIMEOUT_S)
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
