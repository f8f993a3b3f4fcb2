"""MPS as `kiln up` uses it: clients find it, a killed one harms nobody, and a fault is got over.

Needs a CUDA device and NVIDIA's MPS programs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kiln_cli.up.mps import CONTROL, MpsServer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which(CONTROL) is None, reason=f"needs {CONTROL}"),
]
_REPOSITORY = Path(__file__).resolve().parents[2]
# Says what it is, then does what it is told, a line at a time.
_CLIENT = """
import json, sys, torch
from torch.cuda.green_contexts import GreenContext
from kiln_nn.weights.cuda_driver import runs_under_mps
from kiln_nn.weights.vmm_memory import VmmMemory
device = torch.device("cuda", 0)
ones = torch.ones(256, 256, device=device)
print(json.dumps({"mps": runs_under_mps(device), "sms": torch.cuda.get_device_properties(device).multi_processor_count}), flush=True)
for line in sys.stdin:
    if line.strip() == "compute":
        total = float((ones @ ones).sum())
    elif line.strip() == "part":
        part = GreenContext.create(num_sms=16, device_id=0)  # its stream does not keep it
        with torch.cuda.stream(part.Stream()):
            total = float((ones @ ones).sum())
    else:
        memory = VmmMemory(1 << 20, device)
        memory.seal()
        memory.readonly_u8().fill_(1)
        torch.cuda.synchronize()
    print(json.dumps(total), flush=True)
"""


class Client:
    """A process on the GPU; a context manager that leaves none behind."""

    def __init__(self, server: MpsServer) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            cwd=_REPOSITORY,
            env={**os.environ, **server.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, word: str) -> float | None:
        """The answer, or None if the process died of the question."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")  # a socket's path has to be short
    server = MpsServer(folder / "pipe", folder / "log")
    server.start()
    yield server
    server.stop()


def test_clients_share_the_gpu_and_one_that_is_killed_harms_nobody(server):
    with Client(server) as engine, Client(server) as trainer:
        assert engine.facts["mps"]
        assert trainer.facts["mps"]
        assert engine.facts["sms"] == torch.cuda.get_device_properties(0).multi_processor_count
        assert trainer.ask("part") == 256.0**3
        trainer.process.kill()
        trainer.process.wait()
        assert engine.ask("compute") == 256.0**3


def test_after_a_fault_a_new_server_serves(server):
    with Client(server) as engine, Client(server) as trainer:
        assert trainer.ask("write where only reading is allowed") is None
        assert engine.ask("compute") is None  # it goes down too: why the supervisor starts both again
    server.start()
    with Client(server) as engine:
        assert engine.facts["mps"]
        assert engine.ask("compute") == 256.0**3
