"""More gateways beside the one of a running `kiln up`, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from tests.support.stack import Stack, free_port, wait_for

_READY_TIMEOUT_S = 180.0


@contextlib.contextmanager
def more_gateways(stack: Stack, model: Path, count: int) -> Iterator[list[str]]:
    """Base URLs of `count` further gateways of the stack's engine; they end with the context."""
    run_dir = stack.state_dir / "run"
    environment = {
        "KILN_GATEWAY_MODEL_PATH": str(model),
        "KILN_GATEWAY_ENGINE_ADDRESSES": f"unix:{run_dir}/engine.sock",
        "KILN_GATEWAY_REGISTRY_ADDRESS": f"unix:{run_dir}/registry.sock",
        "KILN_GATEWAY_TRAINER_ADDRESSES": f"unix:{run_dir}/trainer.sock",
        "KILN_GATEWAY_REDIS_URL": f"unix://{run_dir}/redis.sock",
    }
    with running_gateways([environment] * count, stack.state_dir) as gateways:
        yield [url for url, _ in gateways]


@contextlib.contextmanager
def running_gateways(
    environments: Sequence[Mapping[str, str]], log_dir: Path, prefixes: Sequence[Sequence[str]] = ()
) -> Iterator[list[tuple[str, int]]]:
    """(base URL, process id) of a gateway for each environment, on free ports, once all are ready.

    `prefixes`: what comes before each one's command line, such as taskset.
    """
    processes: list[subprocess.Popen[bytes]] = []
    urls = []
    try:
        prefixes = prefixes or [()] * len(environments)
        for number, (environment, prefix) in enumerate(zip(environments, prefixes, strict=True)):
            port = free_port()
            with (log_dir / f"gateway-{number + 2}.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        [*prefix, sys.executable, "-m", "kiln_gateway"],
                        env={**os.environ, **environment, "KILN_GATEWAY_PORT": str(port)},
                        stdout=log,
                        stderr=log,
                    )
                )
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            wait_for(lambda url=url: _is_ready(url), f"{url}/readyz", _READY_TIMEOUT_S)
        yield list(zip(urls, (process.pid for process in processes), strict=True))
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
