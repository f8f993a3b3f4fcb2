"""Builders for training jobs: a served tiny model, requests, and hooks that record or interrupt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_nn.lora.peft_format import CONFIG_FILE, WEIGHTS_FILE
from kiln_nn.sharing import WeightServer
from kiln_nn.weights.loader import LoadedModel, load_checkpoint
from kiln_trainer.domain.training import StartingPoint, StepReport, TrainedAdapter, TrainingTask
from kiln_trainer.torch_backend.weights import LocateWeights, WeightLocation
from tests.support.tiny_models import make_checkpoint
from tests.support.variants import quantization

MODEL_ID = "tiny/qwen3.5"


class ServedModel:
    """A tiny model whose weights an engine-like server shares, and how to find it."""

    def __init__(
        self,
        folder: Path,
        socket_folder: Path,
        device: str = "cpu",
        loading: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        make_checkpoint(folder, **overrides)
        self.folder = folder
        self.loaded: LoadedModel = load_checkpoint(
            folder, device, **({"quantization": quantization()} | dict(loading or {}))
        )
        self.server = WeightServer(self.loaded.arena, socket_folder / "weights.sock")

    @property
    def locate(self) -> LocateWeights:
        """What `Engine.GetInfo` and `Engine.ShareWeights` would answer."""
        manifest = self.loaded.manifest
        location = WeightLocation(
            str(self.server.socket_path), manifest.boot_id, manifest.model_hash, MODEL_ID
        )
        return lambda: location


@contextmanager
def served_model(folder: Path, device: str = "cpu", **overrides: Any) -> Iterator[ServedModel]:
    """Serve a random tiny model's weights for as long as the context lasts.

    `loading`: what `load_checkpoint` takes; `overrides`: fields of the model.
    """
    served = ServedModel(folder / "model", folder / "sockets", device, **overrides)
    try:
        yield served
    finally:
        served.server.close()


class RecordingHooks:
    """Keeps every report; raises `error` after step `raise_after`, once."""

    def __init__(self, raise_after: int = 0, error: Exception | None = None) -> None:
        self.reports: list[StepReport] = []
        self.checkpoints: list[int] = []
        self.published: dict[int, bytes] = {}
        self._raise_after = raise_after
        self._error = error

    def after_step(self, report: StepReport) -> None:
        self.reports.append(report)
        if self._error is not None and report.step == self._raise_after:
            raise self._error

    def before_checkpoint(self, step: int) -> None:
        assert not self.checkpoints or step > self.checkpoints[-1]

    def after_checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)

    def publish(self, trained: TrainedAdapter) -> None:
        self.published[trained.step] = bytes(trained.content.view())


def job_config(**overrides: Any) -> trainer_pb2.JobConfig:
    """A job of one epoch; fields of the nested messages go by their own names as well."""
    config = trainer_pb2.JobConfig(adapter="test", epochs=1, batch_tokens=256, seed=7, checkpoint_every=1)
    config.lora.CopyFrom(trainer_pb2.LoraConfig(rank=4, alpha=8, targets=["all"]))
    config.optimizer.CopyFrom(trainer_pb2.OptimizerConfig(learning_rate=1e-2))
    for name, value in overrides.items():
        owners = (config, config.lora, config.optimizer)
        owner = next(owner for owner in owners if name in owner.DESCRIPTOR.fields_by_name)
        if isinstance(value, list):
            del getattr(owner, name)[:]
            getattr(owner, name).extend(value)
        else:
            setattr(owner, name, value)
    return config


def sft_request(examples: Sequence[Sequence[int]], num_prompt: int = 1, **config: Any) -> Any:
    """Examples whose tokens after the first `num_prompt` weigh 1."""
    spec = trainer_pb2.SftSpec()
    for token_ids in examples:
        weights = [0.0] * num_prompt + [1.0] * (len(token_ids) - num_prompt)
        spec.examples.add(token_ids=token_ids, loss_weights=weights)
    return trainer_pb2.SubmitRequest(config=job_config(**config), sft=spec)


def rollout(
    prompt: Sequence[int], completion: Sequence[int], reward: float, **fields: Any
) -> trainer_pb2.GrpoRollout:
    """One scored completion."""
    return trainer_pb2.GrpoRollout(
        prompt_token_ids=prompt, completion_token_ids=completion, reward=reward, **fields
    )


def grpo_spec(groups: Sequence[Sequence[trainer_pb2.GrpoRollout]], **loss: Any) -> trainer_pb2.GrpoSpec:
    """Groups of rollouts; `loss` are fields of GrpoLoss."""
    spec = trainer_pb2.GrpoSpec(loss=trainer_pb2.GrpoLoss(**loss))
    for rollouts in groups:
        spec.groups.add(rollouts=rollouts)
    return spec


def grpo_request(
    groups: Sequence[Sequence[trainer_pb2.GrpoRollout]], loss: dict[str, Any] | None = None, **config: Any
) -> trainer_pb2.SubmitRequest:
    """A GRPO job on those groups."""
    return trainer_pb2.SubmitRequest(config=job_config(**config), grpo=grpo_spec(groups, **(loss or {})))


def peft_folder(result: TrainedAdapter, folder: Path) -> Path:
    """Both files of a result, written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(result.content.config_json)
    (folder / WEIGHTS_FILE).write_bytes(result.content.view())
    return folder


def task(
    request: trainer_pb2.SubmitRequest, folder: Path, starting_point: Any = None, **fields: Any
) -> TrainingTask:
    """A claimed job with its checkpoints in `folder`."""
    return TrainingTask("job_test", request, starting_point, folder, claim_epoch=1, **fields)


def starting_point(reference: str, folder: Path) -> StartingPoint:
    """A PEFT folder as a version to start from or to learn from."""
    return StartingPoint(reference, (folder / CONFIG_FILE).read_text(), folder / WEIGHTS_FILE)
