"""The trainer process of the sharing benchmark: the real backend, on one long job at a time.

It reads a line of JSON with the shares of the next job, or null to end the one that runs, and writes
one line of JSON for each step: its number of tokens, the time of its end on the machine's monotonic
clock, and its metrics.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from kiln_common.logs import configure_logs
from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.errors import JobCancelled
from kiln_trainer.domain.gpu_share import Shares
from kiln_trainer.domain.training import StepReport, TrainingTask
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.engine_load import EngineLoadReader
from kiln_trainer.torch_backend.gpu_share import Choice, LoadWatch, make_share

_MANY_EPOCHS = 5_000


class Reports:
    """Hooks that tell each step, and end the job once another line has come in."""

    def __init__(self, commands: Queue[Any]) -> None:
        self._commands = commands
        self._num_tokens = 0

    def after_step(self, report: StepReport) -> None:
        num_tokens, self._num_tokens = report.num_tokens - self._num_tokens, report.num_tokens
        line = {"tokens": num_tokens, "ended_s": time.monotonic(), "metrics": dict(report.metrics)}
        print(json.dumps(line), flush=True)
        if not self._commands.empty():
            raise JobCancelled("the row is done")

    def before_checkpoint(self, step: int) -> None:
        pass

    def after_checkpoint(self, step: int) -> None:
        pass


def sft_job(num_documents: int, document_tokens: int, vocab_size: int) -> trainer_pb2.SubmitRequest:
    """Random documents, all of them one micro-batch and one optimiser step, again and again."""
    config = trainer_pb2.JobConfig(
        adapter="bench",
        start_fresh=True,
        epochs=_MANY_EPOCHS,
        batch_tokens=num_documents * document_tokens,
        gradient_accumulation=1,
        checkpoint_every=_MANY_EPOCHS,
        lora=trainer_pb2.LoraConfig(rank=16, alpha=32, targets=["all"]),
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-5),
    )
    generator = torch.Generator().manual_seed(0)
    spec = trainer_pb2.SftSpec()
    for _ in range(num_documents):
        token_ids = torch.randint(vocab_size, (document_tokens,), generator=generator).tolist()
        spec.examples.add(token_ids=token_ids, loss_weights=[0.0] + [1.0] * (document_tokens - 1))
    return trainer_pb2.SubmitRequest(config=config, sft=spec)


def main(address: str, num_documents: str, document_tokens: str, vocab_size: str, device: str = "") -> None:
    configure_logs("bench-trainer", "WARNING")
    request = sft_job(int(num_documents), int(document_tokens), int(vocab_size))
    read_load = EngineLoadReader(address)
    choice: Choice = "auto" if torch.cuda.is_available() else "time_slices"
    commands: Queue[Any] = Queue()

    def read_commands() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        commands.put("end")

    threading.Thread(target=read_commands, daemon=True).start()
    backends = []  # each keeps its partitions until the process ends
    while (command := commands.get()) != "end":
        if command is None:
            continue
        watch = LoadWatch(read_load, Shares(**command["shares"]), command["yield_s"])
        backend = TorchBackend.for_engine(
            address,
            device=torch.device(device) if device else None,
            make_share=lambda session, watch=watch: make_share(  # type: ignore[misc]
                choice, session.device, watch, is_own_device=session.is_own_device
            ),
        )
        backends.append(backend)
        with tempfile.TemporaryDirectory() as folder:
            task = TrainingTask("job_bench", request, None, Path(folder), claim_epoch=1)
            with contextlib.suppress(JobCancelled):
                backend.run(task, Reports(commands))
        backend.close()
        print(json.dumps({"ended": True, "mode": backend.gpu_use.mode}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
