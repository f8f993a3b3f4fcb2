"""Chat, training and swaps together for a while: every request and job ends, and memory stays flat.

KILN_SOAK_S is how long: seconds in `make test`, an hour in scripts/chaos.sh, where memory is judged.
"""

import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.load import ChatLoad

pytestmark = [pytest.mark.processes, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("KILN_SOAK_S", "6"))
# Shorter runs are all warm-up.
_JUDGED_FROM_S = 600.0
_SERVICES = ("registry", "engine", "engine-2", "trainer", "gateway", "gateway-2")
_MOST_GROWTH = 1.10
_NOISE_BYTES = 32 * 1024**2


def _memory_bytes(system) -> dict[str, int]:
    sizes = {}
    for service in _SERVICES:
        lines = Path(f"/proc/{system.stack.pid(service)}/status").read_text().splitlines()
        sizes[service] = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
    return sizes


def test_everything_at_once_for_a_while(system):
    stop = threading.Event()
    job_ids: list[str] = []

    def train_on() -> None:
        while not stop.is_set():
            # The default adapter changes under the chat with every job.
            job_ids.append(system.accept(f"soak-{len(job_ids) % 3}", epochs=2, attach=True))
            system.stack.wait_for_job(job_ids[-1])

    pids = {service: system.stack.pid(service) for service in _SERVICES}
    training = threading.Thread(target=train_on)
    with ChatLoad(system.stack.url, 4) as load:
        training.start()
        time.sleep(SOAK_S / 4)
        before = _memory_bytes(system)
        time.sleep(SOAK_S * 3 / 4)
        after = _memory_bytes(system)
        stop.set()
        training.join(120)
    print(f"{SOAK_S:g} s: {len(load.attempts)} requests, {len(job_ids)} jobs, memory {before} -> {after}")
    assert set(load.outcomes()) == {"ok"}, load.outcomes()
    for job_id in job_ids:
        system.succeeded(job_id)
    assert pids == {service: system.stack.pid(service) for service in _SERVICES}, "a service ended"
    if SOAK_S >= _JUDGED_FROM_S:
        grown = {
            s: (before[s], after[s]) for s in _SERVICES if after[s] > before[s] * _MOST_GROWTH + _NOISE_BYTES
        }
        assert not grown, grown
