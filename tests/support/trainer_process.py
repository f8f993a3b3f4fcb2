"""A trainer-like second process: runs one job on weights that another process shares.

`python -m tests.support.trainer_process LOCATION_JSON REQUEST_FILE FOLDER` prints one line of
JSON: every step's loss, the device, the bytes of base weights this process holds itself, and the
memory that torch allocated before and after.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.weights import WeightLocation
from tests.support.training import RecordingHooks, ServedModel, task

_REPOSITORY = Path(__file__).resolve().parents[2]


def run_in_process(served: ServedModel, request: trainer_pb2.SubmitRequest, folder: Path) -> dict[str, Any]:
    """Run the job in a process of its own; returns what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    request_file = folder / "request.bin"
    request_file.write_bytes(request.SerializeToString())
    location = json.dumps(asdict(served.locate()))
    command = [sys.executable, "-m", "tests.support.trainer_process", location, request_file, folder]
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, check=True, timeout=240)
    return json.loads(done.stdout.splitlines()[-1])


def main(location_json: str, request_file: str, folder: str) -> None:
    location = WeightLocation(**json.loads(location_json))
    request = trainer_pb2.SubmitRequest.FromString(Path(request_file).read_bytes())
    backend = TorchBackend(lambda: location)
    hooks = RecordingHooks()
    backend.run(task(request, Path(folder)), hooks)
    report = {
        "losses": [report.metrics["loss"] for report in hooks.reports],
        "num_allocated_base_bytes": backend.mapped_model.num_allocated_base_bytes,
        "cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    backend.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
