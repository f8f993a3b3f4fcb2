"""Distillation jobs bring a student to its teacher, on what the student itself writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_common.errors import EngineUnavailable, InvalidTokenIds
from kiln_common.pb import trainer_pb2
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.packing import pack
from kiln_trainer.domain.errors import NoLearningSignal, WeightsLost
from kiln_trainer.domain.training import AdapterContent, StartingPoint, TrainedAdapter, TrainingTask
from kiln_trainer.recipes.opd import prepare_opd
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.gpu_share import WholeDevice
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.support.distillation import (
    PROMPTS,
    ModelSampler,
    adapter_at,
    log_probabilities,
    opd_request,
    teacher_in,
)
from tests.support.lora_builders import random_lora
from tests.support.training import RecordingHooks, ServedModel, peft_folder, task

DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.3)]
LEARNING = {"learning_rate": 2e-3, "rank": 8, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def teacher(served, tmp_path_factory) -> StartingPoint:
    return teacher_in(tmp_path_factory.mktemp("teacher"), served)


def opd_task(
    request: trainer_pb2.SubmitRequest,
    folder: Path,
    teacher: StartingPoint | None,
    sampler: ModelSampler | None = None,
    start: StartingPoint | None = None,
) -> TrainingTask:
    return task(request, folder, start, teacher=teacher, sampler=sampler)


def moving_means(values: list[float], width: int) -> list[float]:
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


@torch.no_grad()
def own_distance(served: ServedModel, student: Path | None, teacher: Path | None) -> float:
    """KL(student || teacher) on what the student writes with seeds of our own."""
    drawn = ModelSampler(served, start=student).sample(
        None, [(p, 10**6 + i) for p in PROMPTS for i in range(8)]
    )
    total = 0.0
    for rollout in drawn:
        token_ids = [*rollout.prompt_token_ids, *rollout.completion_token_ids]
        log_p, log_q = (
            log_probabilities(served, adapter_at(served, at), token_ids)[
                len(rollout.prompt_token_ids) - 1 : -1
            ]
            for at in (student, teacher)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(drawn)


def test_the_distance_to_the_teacher_falls(served, tmp_path, teacher):
    """By the divergence made of both others; each one's gradient is compared below."""
    settings = {"divergence": "jsd", "beta": 0.3, "samples_per_prompt": 16, "prompts_per_step": 4}
    request = opd_request(PROMPTS, settings=settings, epochs=20, **LEARNING)
    sampler, hooks = ModelSampler(served), RecordingHooks()
    result = TorchBackend(served.locate).run(opd_task(request, tmp_path, teacher, sampler), hooks)
    distances = [report.metrics["teacher_kl"] for report in hooks.reports]
    means = moving_means(distances, 8)
    assert means == sorted(means, reverse=True), means
    assert means[-1] < 0.65 * distances[0]
    # On completions that no step has learned from as well.
    folder, pupil = teacher.safetensors_path.parent, peft_folder(result, tmp_path / "pupil")
    before, after = (own_distance(served, student, folder) for student in (None, pupil))
    assert before > 0.5
    assert after < 0.65 * before


def test_the_base_model_teaches_an_adapter_to_forget(served, tmp_path, teacher):
    folder = teacher.safetensors_path.parent
    request = opd_request(PROMPTS, teacher="base", settings={"samples_per_prompt": 4}, epochs=10, **LEARNING)
    job = opd_task(request, tmp_path, None, ModelSampler(served, start=folder), teacher)
    hooks = RecordingHooks()
    result = TorchBackend(served.locate).run(job, hooks)
    distances = [report.metrics["teacher_kl"] for report in hooks.reports]
    assert distances[-1] < 0.6 * distances[0]
    assert own_distance(served, peft_folder(result, tmp_path / "pupil"), None) < 0.7 * own_distance(
        served, folder, None
    )


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_a_steps_gradient_is_that_of_the_mean_over_completion_tokens(served, teacher, divergence, beta):
    """Autograd through plain logits of one completion after the other; however the step is cut."""
    lora = random_lora(served.loaded.config, seed=5)
    taught = adapter_at(served, teacher.safetensors_path.parent)
    rollouts = [
        trainer_pb2.OpdRollout(prompt_token_ids=prompt, completion_token_ids=range(30 + i, 34 + 2 * i))
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    total, num_tokens = torch.zeros(()), 0
    for rollout in rollouts:
        token_ids = [*rollout.prompt_token_ids, *rollout.completion_token_ids]
        log_p = log_probabilities(served, lora, token_ids)
        log_q = log_probabilities(served, taught, token_ids).detach()
        p, q = log_p.exp(), log_q.exp()
        mixed = (beta * q + (1 - beta) * p).log()
        by_kind = {
            "reverse_kl": p * (log_p - log_q),
            "forward_kl": q * (log_q - log_p),
            "jsd": beta * q * (log_q - mixed) + (1 - beta) * p * (log_p - mixed),
        }
        rows = slice(len(rollout.prompt_token_ids) - 1, len(token_ids) - 1)
        total = total + by_kind[divergence][rows].sum()
        num_tokens += len(rollout.completion_token_ids)
    (total / num_tokens).backward()
    expected = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}

    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    objective = DistillationObjective(divergence, beta)  # type: ignore[arg-type]
    documents = prepare_opd(rollouts, objective).documents
    for parameter in lora.parameters():
        parameter.grad = None
    policy, sums = Policy(model, lora, torch.device("cpu"), teacher=taught), StepSums()
    for cut in (documents[:2], documents[2:]):
        forward_backward(policy, pack(cut), objective, float(num_tokens), sums, is_first_step=True)
    assert sums.metrics()["loss"] == pytest.approx(total.item() / num_tokens, rel=1e-4)
    for name, parameter in lora.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_each_round_is_drawn_by_the_student_as_it_then_is(served, tmp_path, teacher):
    settings = {"prompts_per_step": 1, "refresh_every": 2, "samples_per_prompt": 2}
    request = opd_request(PROMPTS, settings=settings, epochs=1, checkpoint_every=100)
    sampler, hooks = ModelSampler(served), RecordingHooks()
    TorchBackend(served.locate).run(opd_task(request, tmp_path, teacher, sampler), hooks)
    assert [student is None for student in sampler.students] == [True, False]
    metrics = [report.metrics for report in hooks.reports]
    assert [found["round"] for found in metrics] == [1, 1, 2, 2]
    assert [found["num_rollouts"] for found in metrics] == [2] * 4
    assert [found["num_rollouts_truncated"] for found in metrics] == [2] * 4
    assert metrics[0]["completion_tokens_mean"] == 6
    # A round's first step learns from its own sampler; its second from the one before an update.
    mismatch = [found["sampler_trainer_kl"] for found in metrics]
    assert max(mismatch[0], mismatch[2]) < 1e-9
    assert min(mismatch[1], mismatch[3]) > 1e-6


def test_the_share_of_the_device_knows_that_nothing_is_computed_while_a_round_is_drawn(
    served, tmp_path, teacher
):
    calls = []

    class Share(WholeDevice):
        def between_micro_batches(self):
            calls.append("works")

        def work_done(self):
            calls.append("done")

    class Sampler(ModelSampler):
        def sample(self, student, prompts):
            calls.append("draws")
            return super().sample(student, prompts)

    settings = {"prompts_per_step": 2, "refresh_every": 1}
    request = opd_request(PROMPTS, settings=settings, epochs=1, checkpoint_every=100)
    backend = TorchBackend(served.locate, make_share=lambda session: Share("none"))
    backend.run(opd_task(request, tmp_path, teacher, Sampler(served)), RecordingHooks())
    assert [call for call, _ in itertools.groupby(calls)] == ["draws", "works", "done"] * 2


def opd_jobs(served: ServedModel) -> trainer_pb2.SubmitRequest:
    settings = {"prompts_per_step": 2, "refresh_every": 2, "samples_per_prompt": 2}
    return opd_request(PROMPTS, settings=settings, epochs=4, checkpoint_every=3, batch_tokens=24)


def adapter_bytes(result: TrainedAdapter) -> tuple[str, bytes]:
    return result.content.config_json, bytes(result.content.view())


def test_interrupted_at_every_step_the_result_is_byte_identical(served, tmp_path, teacher):
    request = opd_jobs(served)
    whole = ModelSampler(served)
    result = TorchBackend(served.locate).run(
        opd_task(request, tmp_path / "whole", teacher, whole), RecordingHooks()
    )
    assert len(whole.students) == 4
    for step in range(1, 9):
        sampler = ModelSampler(served)
        job = opd_task(request, tmp_path / f"{step}", teacher, sampler)
        with pytest.raises(WeightsLost):
            TorchBackend(served.locate).run(job, RecordingHooks(step, WeightsLost("the engine is gone")))
        again = TorchBackend(served.locate).run(job, RecordingHooks())
        assert adapter_bytes(again) == adapter_bytes(result), step
        # Completions that were drawn before the interruption are not drawn again.
        assert len(sampler.students) == 4


def test_lost_completions_are_drawn_again_with_the_same_seeds(served, tmp_path, teacher):
    request = opd_jobs(served)
    results = []
    for name in ("whole", "moved"):
        sampler = ModelSampler(served)
        job = opd_task(request, tmp_path / name, teacher, sampler)
        if name == "moved":
            with pytest.raises(WeightsLost):
                TorchBackend(served.locate).run(job, RecordingHooks(4, WeightsLost("the engine is gone")))
            for path in (tmp_path / name).iterdir():
                if path.is_file():
                    path.unlink()
        results.append(adapter_bytes(TorchBackend(served.locate).run(job, RecordingHooks())))
    assert results[0] == results[1]


def test_an_engine_that_goes_away_while_it_samples_costs_a_round_and_not_the_job(served, tmp_path, teacher):
    failures = iter([EngineUnavailable("the engine went away")])

    class Flaky(ModelSampler):
        def sample(self, student: AdapterContent | None, prompts: Any) -> list[trainer_pb2.OpdRollout]:
            if student is not None:
                for failure in failures:
                    raise failure
            return super().sample(student, prompts)

    job = opd_task(opd_jobs(served), tmp_path, teacher, Flaky(served))
    hooks = RecordingHooks()
    with pytest.raises(EngineUnavailable):
        TorchBackend(served.locate).run(job, hooks)
    assert [report.step for report in hooks.reports] == [1, 2]
    TorchBackend(served.locate).run(job, hooks)
    assert [report.step for report in hooks.reports][2:] == list(range(1, 9))


def test_files_of_rounds_before_a_checkpoint_do_not_pile_up(served, tmp_path, teacher):
    job = opd_task(opd_jobs(served), tmp_path, teacher, ModelSampler(served))
    TorchBackend(served.locate).run(job, RecordingHooks())
    # The last checkpoint is that of step 6, where the third round ended.
    assert [path.name[:15] for path in tmp_path.glob("rollouts-*")] == ["rollouts-000003"]


def test_given_completions_need_no_sampler(served, tmp_path, teacher):
    rollouts = ModelSampler(served).sample(None, [(prompt, 3) for prompt in PROMPTS])
    request = opd_request(rollouts=rollouts, epochs=3, batch_tokens=16)
    hooks = RecordingHooks()
    TorchBackend(served.locate).run(opd_task(request, tmp_path, teacher), hooks)
    losses = [report.metrics["loss"] for report in hooks.reports]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert hooks.reports[0].metrics["num_rollouts"] == 4


@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_student_that_begins_as_its_teacher_is_told_so(served, tmp_path, teacher, is_fresh):
    name, start = ("base", None) if is_fresh else ("teacher@1", teacher)
    job = opd_task(opd_request(PROMPTS, teacher=name), tmp_path, start, ModelSampler(served), start)
    with pytest.raises(NoLearningSignal, match="begins as its own teacher"):
        TorchBackend(served.locate).run(job, RecordingHooks())


def test_given_log_probabilities_far_from_the_students_leave_its_metrics_finite(served, tmp_path, teacher):
    rollout = trainer_pb2.OpdRollout(
        prompt_token_ids=[7, 8, 9], completion_token_ids=[40, 41, 42], logprobs=[-1e4, -1e4, -0.5]
    )
    hooks = RecordingHooks()
    request = opd_request(rollouts=[rollout], epochs=1)
    TorchBackend(served.locate).run(opd_task(request, tmp_path, teacher), hooks)
    metrics = dict(hooks.reports[0].metrics)
    json.dumps(metrics, allow_nan=False)
    assert metrics["sampler_trainer_kl"] > 1e6  # large, as it should be


def test_a_completion_outside_the_vocabulary_is_refused(served, tmp_path, teacher):
    rollouts = [trainer_pb2.OpdRollout(prompt_token_ids=[1], completion_token_ids=[300])]
    with pytest.raises(InvalidTokenIds, match="300"):
        TorchBackend(served.locate).run(
            opd_task(opd_request(rollouts=rollouts), tmp_path, teacher), RecordingHooks()
        )
