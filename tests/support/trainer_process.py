"""A trainer-like second process: runs one job on weights that another process shares.

`python -m tests.support.trainer_process LOCATION_JSON REQUEST_FILE FOLDER LOADS_JSON
[TEACHER_FOLDER]` prints one line of JSON: every step's loss and partition, the bytes of base weights
this process holds itself, and the memory that torch allocated. With loads (pairs of running and waiting requests, one for each look) it
runs in a part of the GPU that follows them.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.gpu_share import EngineLoad, Shares
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.gpu_share import GpuPartitions, GpuShare, LoadWatch, WholeDevice
from kiln_trainer.torch_backend.weights import WeightLocation, WeightSession
from tests.support.training import RecordingHooks, ServedModel, starting_point, task

_REPOSITORY = Path(__file__).resolve().parents[2]


def run_in_process(
    served: ServedModel,
    request: trainer_pb2.SubmitRequest,
    folder: Path,
    loads: Sequence[EngineLoad] = (),
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Run the job in a process of its own, with a teacher's PEFT folder if it has one.

    Returns what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request_file = folder / "request.bin"
    request_file.write_bytes(request.SerializeToString())
    location = json.dumps(asdict(served.locate()))
    loads_json = json.dumps([[load.num_running, load.num_waiting] for load in loads])
    module = "tests.support.trainer_process"
    command = [sys.executable, "-m", module, location, request_file, folder, loads_json]
    command += [teacher] if teacher else []
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(location_json: str, request_file: str, folder: str, loads_json: str, teacher: str = "") -> None:
    location = WeightLocation(**json.loads(location_json))
    request = trainer_pb2.SubmitRequest.FromString(Path(request_file).read_bytes())
    loads = iter([EngineLoad(*pair) for pair in json.loads(loads_json)])

    def share_of(session: WeightSession) -> GpuShare:
        if loads_json == "[]":
            return WholeDevice("none")
        # Without a time in which to calm down, each load counts by itself.
        watch = LoadWatch(lambda: next(loads, None), Shares(), 0.0, clock=itertools.count(step=10.0).__next__)
        return GpuPartitions(session.device, watch)

    backend = TorchBackend(lambda: location, make_share=share_of)
    hooks = RecordingHooks()
    teacher_point = starting_point("teacher@1", Path(teacher)) if teacher else None
    backend.run(task(request, Path(folder), teacher=teacher_point), hooks)
    report = {
        "losses": [report.metrics["loss"] for report in hooks.reports],
        "gpu_sms": [report.metrics.get("gpu_sms", 0) for report in hooks.reports],
        "num_allocated_base_bytes": backend.mapped_model.num_allocated_base_bytes,
        "cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    backend.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
