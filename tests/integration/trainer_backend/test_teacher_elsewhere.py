"""Distillation from a teacher of whom the trainer gets the likeliest tokens, and no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kiln_common.errors import EngineUnavailable
from kiln_common.pb import trainer_pb2
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.packing import pack
from kiln_trainer.domain.errors import WeightsLost
from kiln_trainer.domain.training import TrainingTask
from kiln_trainer.recipes.opd import prepare_opd
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from kiln_trainer.torch_backend.teacher_scores import TeacherTops
from tests.integration.trainer_backend.test_distillation import DIVERGENCES, adapter_bytes, moving_means
from tests.support.distillation import (
    PROMPTS,
    ModelSampler,
    ModelTeacher,
    adapter_at,
    opd_request,
    teacher_in,
)
from tests.support.lora_builders import random_lora
from tests.support.training import RecordingHooks, ServedModel, served_model, task

VOCAB = 300
ROLLOUTS = [
    trainer_pb2.OpdRollout(prompt_token_ids=prompt, completion_token_ids=range(30 + i, 34 + 2 * i))
    for i, prompt in enumerate(PROMPTS[:3])
]
LEARNING = {"learning_rate": 2e-3, "rank": 8, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def bigger(tmp_path_factory):
    """Another model of the same vocabulary: wider, and of more layers."""
    kinds = (*("linear_attention",) * 3, "full_attention") * 2
    folder = tmp_path_factory.mktemp("bigger")
    with served_model(folder, seed=11, hidden_size=64, layer_types=kinds) as served:
        yield served


@pytest.fixture(scope="module")
def taught(served, tmp_path_factory) -> LoraParameters | None:
    """What a teacher has learned that has something to say."""
    point = teacher_in(tmp_path_factory.mktemp("teacher"), served)
    return adapter_at(served, point.safetensors_path.parent)


def elsewhere_task(
    folder: Path,
    request: trainer_pb2.SubmitRequest,
    teacher: ModelTeacher,
    sampler: ModelSampler | None = None,
) -> TrainingTask:
    request.opd.settings.ClearField("teacher")
    request.opd.settings.teacher_model.CopyFrom(
        trainer_pb2.TeacherModel(model_id="bigger", model_hash="ff", top_k=teacher.top_k)
    )
    return task(request, folder, sampler=sampler, scorer=teacher)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_told_of_the_whole_vocabulary_a_step_is_that_of_a_teacher_in_the_trainer(
    served, taught, tmp_path, divergence, beta
):
    lora = random_lora(served.loaded.config, seed=5)
    objective = DistillationObjective(divergence, beta)
    tops = TeacherTops(ModelTeacher(served, VOCAB, taught), tmp_path, "hash").of("given", ROLLOUTS)
    found = []
    for prepared in (prepare_opd(ROLLOUTS, objective), prepare_opd(ROLLOUTS, objective, tops)):
        for parameter in lora.parameters():
            parameter.grad = None
        model = PackedModel(served.loaded.config, served.loaded.arena.views())
        policy, sums = Policy(model, lora, torch.device("cpu"), teacher=taught), StepSums()
        for cut in (prepared.documents[:2], prepared.documents[2:]):
            forward_backward(policy, pack(cut), objective, 15.0, sums, is_first_step=True)
        found.append((sums.metrics(), {name: p.grad.clone() for name, p in lora.named_parameters()}))
    (full, full_grads), (told, told_grads) = found
    assert told == pytest.approx(full, rel=1e-4)
    for name, expected in full_grads.items():
        error = (told_grads[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_the_distance_to_the_teacher_falls(served, taught, tmp_path):
    settings = {"divergence": "reverse_kl", "samples_per_prompt": 16, "prompts_per_step": 4}
    request = opd_request(PROMPTS, settings=settings, epochs=15, **LEARNING)
    teacher, hooks = ModelTeacher(served, 16, taught), RecordingHooks()
    job = elsewhere_task(tmp_path, request, teacher, ModelSampler(served))
    TorchBackend(served.locate).run(job, hooks)
    distances = [report.metrics["teacher_kl"] for report in hooks.reports]
    means = moving_means(distances, 8)
    assert means == sorted(means, reverse=True), means
    assert means[-1] < 0.8 * distances[0]
    assert teacher.asked == [64] * 15


def sampling_job(served: ServedModel) -> trainer_pb2.SubmitRequest:
    settings = {"prompts_per_step": 2, "refresh_every": 2, "samples_per_prompt": 2}
    return opd_request(PROMPTS, settings=settings, epochs=3, checkpoint_every=3, batch_tokens=24)


def test_interrupted_at_any_step_the_result_is_byte_identical_and_nobody_is_asked_twice(
    served, bigger, tmp_path
):
    def job(name: str, teacher: ModelTeacher) -> TrainingTask:
        return elsewhere_task(tmp_path / name, sampling_job(served), teacher, ModelSampler(served))

    result = TorchBackend(served.locate).run(job("whole", ModelTeacher(bigger, 8)), RecordingHooks())
    for step in (1, 2, 4, 5):
        teacher = ModelTeacher(bigger, 8)
        broken = job(f"{step}", teacher)
        with pytest.raises(WeightsLost):
            TorchBackend(served.locate).run(broken, RecordingHooks(step, WeightsLost("the engine is gone")))
        again = TorchBackend(served.locate).run(broken, RecordingHooks())
        assert adapter_bytes(again) == adapter_bytes(result), step
        assert teacher.asked == [8] * 3


def test_a_teacher_that_goes_away_costs_no_completion(served, bigger, tmp_path):
    class Flaky(ModelTeacher):
        def score(self, rollouts):
            if not self.asked:
                self.asked.append(0)
                raise EngineUnavailable("the teacher went away")
            return super().score(rollouts)

    sampler = ModelSampler(served)
    job = elsewhere_task(tmp_path, sampling_job(served), Flaky(bigger, 8), sampler)
    with pytest.raises(EngineUnavailable):
        TorchBackend(served.locate).run(job, RecordingHooks())
    TorchBackend(served.locate).run(job, RecordingHooks())
    assert len(sampler.students) == 3  # one to a round
    # At the checkpoint of step 3 the first round's went with its completions.
    assert sorted(path.name[:13] for path in tmp_path.glob("scores-*")) == ["scores-000001", "scores-000002"]


def test_given_completions_are_judged_once(served, bigger, tmp_path):
    rollouts = [*ROLLOUTS, trainer_pb2.OpdRollout(prompt_token_ids=[1])]  # one that is empty
    teacher, hooks = ModelTeacher(bigger, 8), RecordingHooks()
    job = elsewhere_task(tmp_path, opd_request(rollouts=rollouts, epochs=3, batch_tokens=16), teacher)
    TorchBackend(served.locate).run(job, hooks)
    assert teacher.asked == [4]
    losses = [report.metrics["loss"] for report in hooks.reports]
    assert losses[2] < losses[0]
