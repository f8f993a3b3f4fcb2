"""Kiln's half of the comparison: the same run as a job of the trainer's own backend.

The weights are shared by a server in this process, as an engine's are; there is no engine beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kiln_common.pb import trainer_pb2
from kiln_nn.lora.peft_format import CONFIG_FILE, WEIGHTS_FILE
from kiln_nn.sharing import WeightServer
from kiln_nn.weights import LoadedModel, load_checkpoint
from kiln_trainer.data.packing import plan_steps
from kiln_trainer.domain.training import StartingPoint, StepReport, TrainingTask
from kiln_trainer.recipes.options import RunOptions
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.weights import LocateWeights, WeightLocation

Spec = dict[str, Any]


class Recorder:
    """StepHooks that note every step's metrics and when it ended."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.ended_s: list[float] = []

    def after_step(self, report: StepReport) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended_s.append(time.perf_counter())
        self.metrics.append(dict(report.metrics))

    def before_checkpoint(self, step: int) -> None:
        pass

    def after_checkpoint(self, step: int) -> None:
        pass


def job_request(spec: Spec) -> trainer_pb2.SubmitRequest:
    """The run as clients submit it."""
    config = trainer_pb2.JobConfig(
        adapter="compared",
        epochs=spec["epochs"],
        batch_tokens=_batch_tokens(spec),
        # In GRPO a step learns from all rollouts, else from one micro-batch.
        gradient_accumulation=0 if spec["recipe"] == "grpo" else 1,
        seed=spec["seed"],
        checkpoint_every=1_000_000,
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=spec["learning_rate"], max_grad_norm=1.0),
    )
    request = trainer_pb2.SubmitRequest(config=config)
    rows = spec["rows"]
    if spec["recipe"] == "sft":
        for row in rows:
            weights = [0.0] * len(row["prompt"]) + [1.0] * len(row["completion"])
            request.sft.examples.add(token_ids=row["prompt"] + row["completion"], loss_weights=weights)
    elif spec["recipe"] == "grpo":
        request.grpo.loss.CopyFrom(
            trainer_pb2.GrpoLoss(type="grpo", importance_mode="none", scale_rewards="none")
        )
        for first in range(0, len(rows), spec["group_rows"]):
            group = request.grpo.groups.add()
            for row in rows[first : first + spec["group_rows"]]:
                group.rollouts.add(
                    prompt_token_ids=row["prompt"],
                    completion_token_ids=row["completion"],
                    reward=row["reward"],
                    temperature=1.0,
                )
    else:
        request.opd.settings.CopyFrom(trainer_pb2.OpdSettings(teacher="base", divergence="reverse_kl"))
        for row in rows:
            request.opd.rollouts.add(prompt_token_ids=row["prompt"], completion_token_ids=row["completion"])
    return request


def rows_in_order(spec: Spec) -> list[Spec]:
    """The rows as the job goes through them, epoch by epoch."""
    options = RunOptions.from_proto(job_request(spec).config)
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in spec["rows"]]
    steps = plan_steps(lengths, options)
    assert {len(step.documents) for step in steps} == {spec["rows_per_step"]}, "steps of different sizes"
    return [spec["rows"][index] for step in steps for index in step.documents]


def run(spec: Spec) -> dict[str, Any]:
    """Losses, gradient norms and seconds of every step, and the GPU memory taken, weights included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_checkpoint(Path(spec["model"]), device, getattr(torch, spec["dtype"]))
    recorder = Recorder()
    with _served(loaded) as locate, tempfile.TemporaryDirectory() as folder:
        backend = TorchBackend(locate, num_threads=spec["num_threads"])
        adapter = Path(spec["adapter"])
        point = StartingPoint("compared@1", (adapter / CONFIG_FILE).read_text(), adapter / WEIGHTS_FILE)
        task = TrainingTask("compared", job_request(spec), point, Path(folder), claim_epoch=1)
        backend.run(task, recorder).content.close()
        backend.close()
    # The weights lie in the driver's memory, which torch does not count.
    peak_bytes = loaded.manifest.nbytes + torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "losses": [metrics["loss"] for metrics in recorder.metrics],
        "grad_norms": [metrics["grad_norm"] for metrics in recorder.metrics],
        # The first step has no start: setting up the job would count as its own.
        "step_s": [after - before for before, after in pairwise(recorder.ended_s)],
        "peak_bytes": peak_bytes,
    }


def _batch_tokens(spec: Spec) -> int:
    """Room for the rows of a step; where not all of them make one step, they have one length."""
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in spec["rows"]]
    return sum(lengths) if spec["recipe"] == "grpo" else spec["rows_per_step"] * lengths[0]


@contextmanager
def _served(loaded: LoadedModel) -> Iterator[LocateWeights]:
    """As an engine shares its weights."""
    manifest = loaded.manifest
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        server = WeightServer(loaded.arena, Path(folder) / "weights.sock")
        location = WeightLocation(str(server.socket_path), manifest.boot_id, manifest.model_hash, "compared")
        try:
            yield lambda: location
        finally:
            server.close()
